"""CoCoA: content reconstruction through the EOS token, then contrastive learning.

One idea a module; import the module you need (`from cocoa_lib.attention import dense_mask`).
Nothing heavy is imported here, so that `import cocoa_lib` is instant.
"""

__version__ = "0.1.0"
