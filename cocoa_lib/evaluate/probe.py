"""What EOS holds: linear probes of the content of a picture, and the geometry of the embeddings.

"Compact and informative" is a claim about the state at EOS; here it is measured. A picture alone is
encoded, and a linear classifier reads from its embedding what it shows. The labels are those of the
data folder's corpus/labels.parquet: image_path, then a column of strings a label. The built-in
benchmark has one. Works on any checkpoint: causal backbone, a stage in the middle, final embedder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..data import corpus


class Probe(NamedTuple):
    value: float  # percent of the test rows that are right
    low: float  # 95 % Wilson interval over test rows
    high: float
    majority: float  # percent right for the answer that is most frequent in training
    n: int  # test rows


def fit_probe(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> Probe:
    """Read labels (N,) from frozen embeddings (N, H) by logistic regression, L2, C = 1.

    Features are standardised by the training rows. Labels that training lacks count as errors.
    Raises scikit-learn's ValueError for different lengths and a single class in training.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train_x, train_y)
    classes, counts = np.unique(train_y, return_counts=True)
    right = int(accuracy_score(test_y, model.predict(test_x), normalize=False))
    majority = 100 * float(np.mean(np.asarray(test_y) == classes[counts.argmax()]))
    interval = stats.binomtest(right, len(test_y)).proportion_ci(method="wilson")
    low, high = 100 * float(interval.low), 100 * float(interval.high)
    return Probe(100 * right / len(test_y), low, high, majority, len(test_y))


def effective_rank(embeddings: np.ndarray) -> float:
    """Compute exp of the entropy of the singular values over their sum: (N, H) -> 1 to min(N, H).

    Uncentred: a collapsed set gives 1, and a large common direction counts as the partial collapse
    that it is. Raises ValueError for values that are not finite, or all zero. Source: Roy and
    Vetterli 2007.
    """
    singular = np.linalg.svd(_check_matrix(embeddings), compute_uv=False)
    if not singular.sum():
        raise ValueError("all embeddings are zero, so they have no effective rank")
    return float(np.exp(stats.entropy(singular)))  # entropy divides by the sum


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the mean squared distance of the pairs x[i], y[i] at length 1: 0 (same) to 4.

    (N, H) twice. Raises ValueError for different shapes and zero vectors. Source: Wang and Isola
    2020.
    """
    x, y = _normalise(x), _normalise(y)
    if x.shape != y.shape:
        raise ValueError(f"pairs need equal shapes, found {x.shape} and {y.shape}")
    return float(np.mean(np.sum((x - y) ** 2, axis=1)))


def uniformity(x: np.ndarray) -> float:
    """Compute log of the mean of exp(-2 squared distance) over pairs of distinct rows at length 1.

    (N, H) -> 0 for a collapsed set, about -4 for a uniform one of high dimension. Raises ValueError
    for fewer than two rows and zero vectors. Source: Wang and Isola 2020.
    """
    x = _normalise(x)
    if len(x) < 2:
        raise ValueError("uniformity needs at least two vectors")
    # At length 1 the squared distance is 2 - 2 cosine. Pairs of a row with itself are taken off.
    total = sum(np.exp(4 * (x[i : i + 1024] @ x.T - 1)).sum() for i in range(0, len(x), 1024))
    return float(np.log((total - len(x)) / (len(x) * (len(x) - 1))))


def _check_matrix(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"expected a finite, non-empty array (N, H), found shape {x.shape}")
    return x


def _normalise(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x := _check_matrix(x), axis=1, keepdims=True)
    for row in np.flatnonzero(lengths == 0)[:1]:
        raise ValueError(f"vector {row} is zero and has no direction")
    return x / lengths


def read_labels(data: Path) -> pd.DataFrame:
    """Read what the pictures of the corpus show: index image_path, a column of strings a label.

    Raises FileNotFoundError where the data folder has no labels.
    """
    path = data / "corpus" / "labels.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; only data with known content can be probed")
    return pd.read_parquet(path).set_index("image_path")


def probe(
    embedder: Any, data: str | Path, *, n_train: int = 2000, batch_size: int = 64
) -> pd.DataFrame:
    """Probe one embedder on a data folder: rows of measure, value, low, high, majority, n.

    Probes (percent right, 95 % Wilson interval over test pictures; `majority`: always the answer
    that is most frequent in training): trained on the first `n_train` pictures of the corpus,
    tested on all held-out ones. Geometry of the held-out pictures, without interval:
    effective_rank (1 to H), uniformity (0 collapsed, lower is more spread), alignment with their
    captions (0 to 4). Raises FileNotFoundError where the folder has no labels.
    """
    data = Path(data)
    labels, parts = read_labels(data), []
    for split, limit in (("train", n_train), ("heldout", None)):
        rows = corpus.captions(data, split)[:limit]
        vectors = embedder.encode([{"image": row["image"]} for row in rows], batch_size=batch_size)
        names = [Path(row["image"]).relative_to(data / "images").as_posix() for row in rows]
        parts.append((rows, vectors, labels.loc[names]))
    (_, train_x, train_y), (rows, test_x, test_y) = parts
    captions = embedder.encode([{"text": row["target"]} for row in rows], batch_size=batch_size)
    found = [
        {"measure": name}
        | fit_probe(train_x, train_y[name].to_numpy(), test_x, test_y[name].to_numpy())._asdict()
        for name in labels.columns
    ]
    geometry = {
        "effective_rank": effective_rank(test_x),
        "uniformity": uniformity(test_x),
        "alignment": alignment(test_x, captions),
    }
    found += [{"measure": name, "value": x, "n": len(test_x)} for name, x in geometry.items()]
    return pd.DataFrame(found)
