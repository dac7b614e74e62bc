"""What EOS holds: linear probes of the content of a picture, and the geometry of the embeddings.

"Compact and informative" is a claim about the state at EOS; here it is measured. A picture alone is
encoded, and a linear classifier reads from its embedding what it shows. The labels are those of the
data folder's corpus/labels.parquet: image_path, then a column of strings a label. The built-in
benchmark has one. Works on any checkpoint: causal backbone, a stage in the middle, final embedder.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from ..data import corpus


def fit_probe(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> dict[str, float]:
    """Read labels (N,) from frozen embeddings (N, H) by logistic regression, L2, C = 1.

    Returns value (percent of the test rows that are right), low, high (95 % Wilson interval over
    test rows), majority (percent right for the answer most frequent in training) and n (test rows).
    Features are standardised by the training rows. Labels that training lacks count as errors.
    Raises scikit-learn's ValueError for different lengths and a single class in training.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train_x, train_y)
    always, n = DummyClassifier(strategy="most_frequent").fit(train_x, train_y), len(test_y)
    right = int((model.predict(test_x) == test_y).sum())
    low, high = stats.binomtest(right, n).proportion_ci(method="wilson")
    majority = 100 * always.score(test_x, test_y)
    found = {"value": 100 * right / n, "low": 100 * low, "high": 100 * high}
    return {**found, "majority": majority, "n": n}


def effective_rank(embeddings: np.ndarray) -> float:
    """Compute exp of the entropy of the singular values over their sum: (N, H) -> 1 to min(N, H).

    Uncentred: a collapsed set gives 1, and a large common direction counts as the partial collapse
    that it is. Source: Roy and Vetterli 2007.
    """
    singular = np.linalg.svd(np.asarray(embeddings, dtype=np.float64), compute_uv=False)
    return float(np.exp(stats.entropy(singular)))  # entropy divides by the sum


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the mean squared distance of the pairs x[i], y[i] at length 1: 0 (same) to 4.

    (N, H) twice. Source: Wang and Isola 2020.
    """
    x, y = (normalize(np.asarray(each, dtype=np.float64)) for each in (x, y))
    return float(np.mean(np.sum((x - y) ** 2, axis=1)))


def uniformity(x: np.ndarray) -> float:
    """Compute log of the mean of exp(-2 squared distance) over pairs of distinct rows at length 1.

    (N, H) -> 0 for a collapsed set, about -4 for a uniform one of high dimension. Source: Wang and
    Isola 2020.
    """
    distances = pdist(normalize(np.asarray(x, dtype=np.float64)), "sqeuclidean")
    return float(np.log(np.mean(np.exp(-2 * distances))))


def probe(embedder: Any, data: str | Path) -> pd.DataFrame:
    """Probe one embedder on a data folder: rows of measure, value, low, high, majority, n.

    Probes (percent right, 95 % Wilson interval over test pictures; `majority`: always the answer
    that is most frequent in training): trained on the first 2000 labelled pictures of the corpus,
    tested on all held-out ones. Geometry of the held-out pictures, without interval: effective_rank (1 to H),
    uniformity (0 collapsed, lower is more spread), alignment with their captions (0 to 4). Raises
    FileNotFoundError where the folder has no labels.
    """
    data = Path(data)
    labels = pd.read_parquet(data / "corpus" / "labels.parquet").set_index("image_path")
    parts = []
    for split, limit in (("train", 2000), ("heldout", None)):
        named = (
            (Path(row["image"]).relative_to(data / "images").as_posix(), row)
            for row in corpus.captions(data, split)
        )
        chosen = islice((pair for pair in named if pair[0] in labels.index), limit)
        names, rows = map(list, zip(*chosen, strict=True))
        vectors = embedder.encode([{"image": row["image"]} for row in rows], batch_size=64)
        parts.append((rows, vectors, labels.loc[names]))
    (_, train_x, train_y), (rows, test_x, test_y) = parts
    captions = embedder.encode([{"text": row["target"]} for row in rows], batch_size=64)
    found = [
        {"measure": name}
        | fit_probe(train_x, train_y[name].to_numpy(), test_x, test_y[name].to_numpy())
        for name in labels.columns
    ]
    geometry = {
        "effective_rank": effective_rank(test_x),
        "uniformity": uniformity(test_x),
        "alignment": alignment(test_x, captions),
    }
    found += [{"measure": name, "value": x, "n": len(test_x)} for name, x in geometry.items()]
    return pd.DataFrame(found)
