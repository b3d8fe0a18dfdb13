"""Fits the offline user to judged replies (English) and to logs of a real sentient user (Chinese).

    python scripts/calibrate.py en                                  writes data/offline/en_fit.json
    python scripts/calibrate.py zh ../shared/data/sage_logs/*.gz    writes data/offline/zh_fit.json

change = 20 s(z) - 10, where s is the logistic function and z a sum over named features, each with a
weight of its own and a smaller one for each hidden intention. Two of the features, `tone` and
`need`, are sums over a list of words whose weights are fitted first, on other people than those
they are then used on. All weights are shrunk towards 0 (ridge); where nobody doubts a sign it is
bound. Whatever is printed is measured on people that the fit has not seen.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import read_rows  # noqa: E402
from simulator import INTENTIONS, EmotionRules, Profile, parse_profile  # noqa: E402
from users.gauge import everybody, read_items, spearman  # noqa: E402
from users.offline import DATA, measure, phrases, user_hash, with_context  # noqa: E402

UP = "story talk last known joined kin owner tone need".split()
DOWN = """foreign strangers wrong_kin wrong_owner cheer meta marks me loops again copied cut
run_on short long garbled worst""".split()  # the logs' replies are never cut, short or salad
LEAST = {"en": 4, "zh": 60}  # replies that hold a phrase of the list
RIDGE, WORDS, NEEDS = 0.02, 0.01, 0.02  # of features, of words, of words by intention
FOLDS = 6


def fit_glm(X, y: np.ndarray, ridge: np.ndarray, bounds: list | None = None) -> np.ndarray:
    """[1 + D] intercept and weights: least squares through 20 s(z) - 10, X [N, D], y [N]."""
    n, d = X.shape

    def loss(w):
        s = 1 / (1 + np.exp(-(X @ w[1:] + w[0])))
        error = 20 * s - 10 - y
        slope = error * 20 * s * (1 - s) / n
        return (error @ error / n + (ridge * w[1:]) @ w[1:]) / 2, np.r_[slope.sum(), X.T @ slope + ridge * w[1:]]

    limits = [(None, None)] + (bounds or [(None, None)] * d)
    return minimize(loss, np.zeros(d + 1), jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 200}).x


class Rows:
    """Replies with what was measured of them: `features` (list of dicts), phrases, intention, person, y [N]."""

    def __init__(self, profiles: list[Profile], features: list[dict], replies: list[str], y, context):
        self.profiles, self.features, self.y, self.context = profiles, features, np.array(y), context
        self.phrases = [phrases(reply, p.language) for reply, p in zip(replies, profiles)]
        self.intention = np.array([p.intention for p in profiles])
        self.people = np.array([p.id for p in profiles])
        self.language = profiles[0].language

    def folds(self, mine: np.ndarray, count: int) -> np.ndarray:
        """Number of each row's fold, by person: -1 outside `mine`."""
        names = np.random.default_rng(0).permutation(sorted(set(self.people[mine])))
        number = {name: i % count for i, name in enumerate(names)}
        return np.array([number[p] if m else -1 for p, m in zip(self.people, mine)])

    def table(self, found: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """[N, D] of all features; `found` [N, 2] holds tone and need."""
        rows = [with_context(f | {"tone": t, "need": n}, p, *c)
                for f, (t, n), p, c in zip(self.features, found, self.profiles, self.context)]
        return np.array([list(row.values()) for row in rows]), list(rows[0])


def fit_words(rows: Rows, mine: np.ndarray) -> tuple[dict, np.ndarray]:
    """({phrase: {"all" or intention: weight}}, [N, 2] raw tone and need of every row by those weights)."""
    count = Counter(phrase for i in np.flatnonzero(mine) for phrase in rows.phrases[i])
    known = {phrase: j for j, phrase in enumerate(sorted(p for p, n in count.items() if n >= LEAST[rows.language]))}
    i, j, x = [], [], []
    for n, found in enumerate(rows.phrases):
        for phrase in found & known.keys():
            i.append(n), j.append(known[phrase]), x.append(1 / np.sqrt(max(9, len(found))))
    W = sp.csr_matrix((x, (i, j)), (len(rows.phrases), len(known)))
    table, names = rows.table(np.zeros((len(rows.y), 2)))
    own = [sp.csr_matrix(W.multiply((rows.intention == key)[:, None])) for key in INTENTIONS]
    X = sp.hstack([sp.csr_matrix(table), W, *own]).tocsr()
    ridge = np.repeat([RIDGE, WORDS, NEEDS], [table.shape[1], len(known), len(known) * len(own)])
    bounds = [bound(name) for name in names] + [(None, None)] * (X.shape[1] - len(names))
    w = fit_glm(X[mine], rows.y[mine], ridge, bounds)[1 + table.shape[1] :].reshape(-1, len(known))
    raw = np.stack([W @ w[0], sum(part @ v for part, v in zip(own, w[1:]))], 1)
    return {phrase: dict(zip(("all", *INTENTIONS), w[:, j])) for phrase, j in known.items()}, raw


def bound(name: str) -> tuple:
    """The sign that nobody doubts."""
    return (0, None) if name in UP else (None, 0) if name in DOWN else (None, None)


def fit(rows: Rows, mine: np.ndarray) -> tuple[dict, np.ndarray]:
    """(coefficients as users/offline.py reads them, [N] predictions for all rows)."""
    raw, fold = np.zeros((len(rows.y), 2)), rows.folds(mine, FOLDS)
    for k in range(FOLDS):
        raw[fold == k] = fit_words(rows, mine & (fold != k))[1][fold == k]
    words, all_raw = fit_words(rows, mine)
    raw[~mine] = all_raw[~mine]
    limits = np.percentile(abs(raw[mine]), 97, axis=0)
    table, names = rows.table(np.clip(raw / limits, -1, 1))
    w = fit_glm(table[mine], rows.y[mine], np.full(len(names), RIDGE), [bound(name) for name in names])
    features = {name: float(x) for name, x in zip(names, w[1:])}
    fitted = {"intercept": float(w[0]), "limits": limits.tolist(), "features": features, "words": words}
    return fitted, 20 / (1 + np.exp(-(table @ w[1:] + w[0]))) - 10


def english(judge: str) -> tuple[Rows, list[dict]]:
    """The judged replies by one judge's numbers."""
    pairs = read_items("en.jsonl", everybody())
    items = [item for _, item in pairs]
    features = [measure(i.profile, list(i.said), list(i.heard), i.reply) for i in items]
    context = [(len(item.heard), 50.0) for item in items]
    y = [row[judge]["change"] for row, _ in pairs]
    return Rows([i.profile for i in items], features, [i.reply for i in items], y, context), [row for row, _ in pairs]


def chinese(paths: list[str]) -> tuple[Rows, np.ndarray]:
    """The scored replies of SAGE's logs, and the tested model of each."""
    profiles, features, replies, y, context, models = [], [], [], [], [], []
    for path in paths:
        for where, row in read_rows(Path(path)):
            keys = {key: row[key] for key in ("id", "player", "scene", "task")}
            person = parse_profile(keys | {"main_cha": row["character"], "language": "zh"}, where)
            said, heard, emotion = [], [], EmotionRules().start
            for turn, after in zip(row["history"], row["history"][1:] + [{}]):
                if turn["role"] == "user":
                    said, emotion = [*said, turn["content"]], turn["emotion-point"]
                    continue
                if "planning" in after:
                    profiles.append(person), replies.append(turn["content"]), context.append((len(heard), emotion))
                    features.append(measure(person, said, heard, turn["content"]))
                    y.append(EmotionRules().change(float(after["planning"]["change"])))
                    models.append(Path(path).name)
                heard.append(turn["content"])
    return Rows(profiles, features, replies, y, context), np.array(models)


def trimmed(table: dict[str, dict], least: float) -> dict[str, dict]:
    """Weights of at least this size, rounded; names with none left out."""
    kept = {name: {key: round(float(w), 2) for key, w in row.items() if abs(w) >= least} for name, row in table.items()}
    return {name: row for name, row in kept.items() if row}


def save(fitted: dict, figures: dict, language: str, command: str) -> Path:
    """Write data/offline/LANGUAGE_fit.json, a line a feature and a phrase, by weight."""
    features, words = {k: round(w, 2) for k, w in fitted["features"].items() if abs(w) > 0.005}, trimmed(fitted["words"], 0.1)
    order = sorted(words, key=lambda name: -max(map(abs, words[name].values())))
    head = {"made_by": command, "measured_on_unseen_people": figures, "intercept": round(fitted["intercept"], 3),
            "limits": [round(x, 3) for x in fitted["limits"]]}  # fmt: skip
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    for name, table, names in (("features", features, features), ("words", words, order)):
        rows = ",\n".join(f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(table[key])}" for key in names)
        lines.append(f'"{name}": {{\n{rows}\n}}')
    path = DATA / f"{language}_fit.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def main(argv: list[str]) -> None:
    language, command = argv[0], "python scripts/calibrate.py " + " ".join(argv)
    rows, raw = english("a")
    seen = np.array([row["split"] == "fit" for row in raw])
    fitted, predicted = fit(rows, seen)
    both = np.array([(row["a"]["change"] + row["b"]["change"]) / 2 for row in raw])
    figures = {"replies": int((~seen).sum()), "spearman": round(spearman(predicted[~seen], both[~seen]), 3),
               "mean_error": round(float(abs(predicted - both)[~seen].mean()), 2)}  # fmt: skip
    print(figures, save(fitted, figures, language, command), user_hash())


if __name__ == "__main__":
    main(sys.argv[1:])
