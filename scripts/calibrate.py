"""Fits the offline user to judged replies (English) and to logs of a real sentient user (Chinese).

    python scripts/calibrate.py en                                  writes data/offline/en_fit.json
    python scripts/calibrate.py zh ../shared/data/sage_logs/*.gz    writes data/offline/zh_fit.json
    python scripts/calibrate.py check ../shared/data/sage_logs/*.gz   prints its figures, people and models left out

change = 20 s(z) - 10, where s is the logistic function and z a weighted sum of named features. Two of
them, `tone` and `need`, are sums over a list of words, `need` with weights of its own for each hidden
intention; these are fitted first, on other people than those they are then used on. All weights are
shrunk towards 0 (ridge); where nobody doubts a sign it is bound. English has two such sets, `small` for
what reads as if a small model had said it and `able` for the rest, and a `gate` that says which: what
parts a good reply from a bad one is another thing among the stumbling and among the fluent. Chinese has
`first` for first replies, which the real user judged by other things than the tenth. Whatever is printed
is measured on people that the fit has not seen.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import read_rows  # noqa: E402
from judges.gauge import JUDGED, OWN, Item, everybody, read_items, read_sage, sage_figures, spearman  # noqa: E402
from judges.shadow import BUCKETS, NAMES, listen  # noqa: E402
from simulator import INTENTIONS  # noqa: E402
from users.offline import DATA, measure, phrases, user_hash, with_context  # noqa: E402

UP = "heard story talk joined tone need".split()
DOWN = """foreign blames self misheard same doubled wrong_number wrong_kin wrong_owner cheer marks loops again copied
cut run_on long garbled worst""".split()
# What added something on people left out, by dropping and adding one feature at a time (docs/offline_user.md).
KEPT = {"en": set("""talk joined foreign wrong_kin wrong_owner wrong_number you self blames feelings misheard
same doubled copied cut run_on length worst tone need""".split())
        | {"story x tone", "story x need", "story x foreign", "story x cheer", "joined x wrong_owner",
           "length x joined", "absolves x agreement"}}
LEAST = {"en": 4, "zh": 100, "first": 10}  # replies that hold a phrase of the list
RIDGE, WORDS, NEEDS = 0.02, 0.01, 0.02  # of features, of words, of words by intention
FOLDS = 4
OTHERS = 0.02  # weight of a reply of the other kind, in `able` and `small`
GATE, DOUBT = 2.0, 2.5  # how sharply the gate parts them; in doubt a reply is a small model's, lest it learn to pass
OWN_WEIGHT = 4.0  # of our own models' replies, for the second ear
JUDGED_WEIGHT = 4.0  # of judged Chinese replies, against those of logs: few, but the only bad ones


def fit_glm(X, y: np.ndarray, ridge: np.ndarray, bounds: list | None = None, weight=1.0) -> np.ndarray:
    """[1 + D] intercept and weights: least squares through 20 s(z) - 10, X [N, D], y and weight [N]."""
    n, d = X.shape
    weight = np.broadcast_to(weight, n) / np.mean(weight)

    def loss(w):
        s = 1 / (1 + np.exp(-(X @ w[1:] + w[0])))
        error = 20 * s - 10 - y
        slope = weight * error * 20 * s * (1 - s) / n
        value = ((weight * error) @ error / n + (ridge * w[1:]) @ w[1:]) / 2
        return value, np.r_[slope.sum(), X.T @ slope + ridge * w[1:]]

    limits = [(None, None)] + (bounds or [(None, None)] * d)
    return minimize(loss, np.zeros(d + 1), jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 100}).x


class Rows:
    """Replies with what was measured of them: features, phrases, intention, person; y [N] is what they brought,
    weight [N] how much each counts, own [N] whether a model of ours said it, judged [N] whether by our judges."""

    def __init__(self, items: list[Item], y, weight=1.0, own=False, judged=True):
        self.items, self.y, self.judged = items, np.array(y), np.broadcast_to(judged, len(items))
        self.weight, self.own = np.broadcast_to(weight, len(items)), np.broadcast_to(own, len(items))
        self.features = [measure(i.profile, list(i.said), list(i.heard), i.reply) for i in items]
        self.phrases = [phrases(i.reply, i.profile.language) for i in items]
        self.intention = np.array([i.profile.intention for i in items])
        self.people = np.array([i.profile.id for i in items])
        self.language = items[0].profile.language

    def folds(self, mine: np.ndarray, count: int) -> np.ndarray:
        """Number of each row's fold, by person: -1 outside `mine`."""
        names = np.random.default_rng(0).permutation(sorted(set(self.people[mine])))
        number = {name: i % count for i, name in enumerate(names)}
        return np.array([number[p] if m else -1 for p, m in zip(self.people, mine)])

    def table(self, found: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """[N, D] of all features; `found` [N, 2] holds tone and need."""
        rows = [with_context(f | {"tone": t, "need": n}, i.profile, len(i.heard), i.emotion)
                for f, (t, n), i in zip(self.features, found, self.items)]
        names = [name for name in rows[0] if name in KEPT.get(self.language, rows[0])]
        return np.array([[row[name] for name in names] for row in rows]), names


def bag(rows: Rows, mine: np.ndarray, least: int) -> tuple[sp.csr_matrix, list[str]]:
    """[N, P] of the P phrases that are frequent enough, scaled by the length of a reply, and the phrases."""
    count = Counter(phrase for i in np.flatnonzero(mine) for phrase in rows.phrases[i])
    known = {phrase: j for j, phrase in enumerate(sorted(p for p, n in count.items() if n >= least))}
    i, j, x = [], [], []
    for n, found in enumerate(rows.phrases):
        for phrase in found & known.keys():
            i.append(n), j.append(known[phrase]), x.append(1 / np.sqrt(max(9, len(found))))
    return sp.csr_matrix((x, (i, j)), (len(rows.phrases), len(known))), list(known)


def fit_words(rows: Rows, mine: np.ndarray, weight: np.ndarray, least: int, needs: float) -> tuple[dict, np.ndarray]:
    """({phrase: {"all" or intention: weight}}, [N, 2] raw tone and need of every row by those weights).

    `needs` is the ridge of weights by intention; 0 for none, where replies are few and would be learnt by heart.
    """
    W, known = bag(rows, mine, least)
    table, names = rows.table(np.zeros((len(rows.y), 2)))
    own = [sp.csr_matrix(W.multiply((rows.intention == key)[:, None])) for key in INTENTIONS if needs]
    X = sp.hstack([sp.csr_matrix(table), W, *own]).tocsr()
    ridge = np.repeat([RIDGE, WORDS, needs], [table.shape[1], len(known), len(known) * len(own)])
    bounds = [bound(name) for name in names] + [(None, None)] * (X.shape[1] - len(names))
    w = fit_glm(X[mine], rows.y[mine], ridge, bounds, weight[mine])[1 + table.shape[1] :].reshape(-1, len(known))
    raw = np.stack([W @ w[0], sum((part @ v for part, v in zip(own, w[1:])), np.zeros(len(rows.y)))], 1)
    return {phrase: dict(zip(("all", *INTENTIONS), w[:, j])) for j, phrase in enumerate(known)}, raw


def bound(name: str) -> tuple:
    """The sign that nobody doubts."""
    return (0, None) if name in UP else (None, 0) if name in DOWN else (None, None)


def fit_gate(rows: Rows, mine: np.ndarray) -> tuple[dict, np.ndarray]:
    """(the gate's coefficients, [N] its log-odds): does a reply read as if a model of ours had said it?"""
    W, known = bag(rows, mine, LEAST[rows.language])
    names = [name for name in rows.features[0] if name not in ("same", "again")]  # not by what it said before
    X = sp.hstack([sp.csr_matrix([[f[name] for name in names] for f in rows.features]), W]).tocsr()
    ridge = np.repeat([RIDGE, WORDS], [len(names), len(known)])
    even = np.where(rows.own, 1.0, rows.own[mine].sum() / (~rows.own[mine]).sum())
    w = fit_glm(X[mine], np.where(rows.own, 9.5, -9.5)[mine], ridge, None, even[mine]) * GATE
    w[0] += DOUBT
    words = {phrase: {"all": weight} for phrase, weight in zip(known, w[1 + len(names) :])}
    return {"intercept": w[0], "features": dict(zip(names, w[1:].tolist())), "words": words}, X @ w[1:] + w[0]


def fit(rows: Rows, mine: np.ndarray) -> tuple[dict, np.ndarray]:
    """(coefficients as users/offline.py reads them, [N] predictions for all rows)."""
    if not rows.own.any():
        opening = np.array([not item.heard for item in rows.items])
        able, z = fit_one(rows, mine, rows.weight)
        few = mine & (opening | rows.judged)  # the judged ones at any turn: they are the bad ones
        first, z_first = fit_one(rows, few, np.ones(len(few)), LEAST["first"], needs=0.0)
        return {"able": able, "first": first}, 20 / (1 + np.exp(-np.where(opening, z_first, z))) - 10
    gate, odds = fit_gate(rows, mine)
    able, z_able = fit_one(rows, mine, np.where(rows.own, OTHERS, 1.0))
    small, z_small = fit_one(rows, mine, np.where(rows.own, 1.0, OTHERS))
    share = 1 / (1 + np.exp(-odds))
    z = (1 - share) * z_able + share * z_small
    return {"gate": gate, "able": able, "small": small}, 20 / (1 + np.exp(-z)) - 10


def fit_one(rows: Rows, mine: np.ndarray, weight: np.ndarray, least=0, needs=NEEDS) -> tuple[dict, np.ndarray]:
    """(one set of coefficients, [N] log-odds by them)."""
    words_of = partial(fit_words, rows, weight=weight, least=least or LEAST[rows.language], needs=needs)
    raw, fold = np.zeros((len(rows.y), 2)), rows.folds(mine, FOLDS)
    for k in range(FOLDS):
        raw[fold == k] = words_of(mine & (fold != k))[1][fold == k]
    words, all_raw = words_of(mine)
    raw[~mine] = all_raw[~mine]
    limits = np.percentile(abs(raw[mine]), 97, axis=0)
    limits[limits == 0] = 1.0  # no words at all
    table, names = rows.table(np.clip(raw / limits, -1, 1))
    ridge = np.full(len(names), RIDGE)
    w = fit_glm(table[mine], rows.y[mine], ridge, [bound(name) for name in names], weight[mine])
    features = {name: float(x) for name, x in zip(names, w[1:])}
    fitted = {"intercept": float(w[0]), "limits": limits.tolist(), "features": features, "words": words}
    return fitted, table @ w[1:] + w[0]


def judged(name: str, judge: str) -> tuple[Rows, list[dict]]:
    """The judged replies with one judge's numbers; their emotion is unknown, and left at the middle."""
    pairs = read_items(name, everybody())
    items = [replace(item, emotion=50.0) for _, item in pairs]
    own = [row["source"].startswith(OWN) for row, _ in pairs]
    return Rows(items, [row[judge]["change"] for row, _ in pairs], own=own), [row for row, _ in pairs]


def second_ear() -> dict:
    """The shadow's coefficients, fitted to the other judge by judges/shadow.py's features."""
    pairs = read_items("en.jsonl", everybody())
    heard = [listen(i.profile.scene, i.profile.persona, list(i.said), list(i.heard), i.reply) for _, i in pairs]
    named, y = np.array([named for named, _ in heard]), np.array([row["b"]["change"] for row, _ in pairs])
    where = [(n, j, 1 / np.sqrt(max(20, len(found)))) for n, (_, found) in enumerate(heard) for j in found]
    i, j, x = zip(*where)
    W = sp.csr_matrix((x, (i, j)), (len(pairs), BUCKETS))
    X = sp.hstack([sp.csr_matrix(named), W, W.multiply(named[:, 1:3].max(1)[:, None])]).tocsr()
    seen = np.array([row["split"] == "fit" for row, _ in pairs])
    weight = np.array([OWN_WEIGHT if row["source"].startswith(OWN) else 1.0 for row, _ in pairs])
    w = fit_glm(X[seen], y[seen], np.repeat([RIDGE, WORDS], [len(NAMES), 2 * BUCKETS]), None, weight[seen])
    predicted = 20 / (1 + np.exp(-(X @ w[1:] + w[0]))) - 10
    both = np.array([(row["a"]["change"] + row["b"]["change"]) / 2 for row, _ in pairs])
    figures = {"spearman": round(spearman(predicted[~seen], both[~seen]), 3),
               "mean_error": round(float(abs(predicted - both)[~seen].mean()), 2)}  # fmt: skip
    named, alone, about = np.split(np.round(w[1:], 2), [len(NAMES), len(NAMES) + BUCKETS])
    return {"measured_on_unseen_people": figures, "intercept": round(float(w[0]), 3), "named": named.tolist(),
            "alone": alone.tolist(), "about": about.tolist()}  # fmt: skip


def chinese(paths: list[str]) -> tuple[Rows, np.ndarray, np.ndarray]:
    """(replies of logs, then judged ones, [N] the log each is from or "", [N] whether it may be fitted)."""
    items, real, models = read_sage(paths)
    rows, raw = judged("zh.jsonl", "a")
    models = np.concatenate([models, [""] * len(raw)])
    weight = np.where(models == "", JUDGED_WEIGHT, 1.0)
    seen = np.array([True] * len(items) + [row["split"] == "fit" for row in raw])
    return Rows(items + rows.items, np.concatenate([real, rows.y]), weight, judged=models == ""), models, seen


def left_out(rows: Rows, models: np.ndarray, seen: np.ndarray) -> dict:
    """The figures of `gauge.sage_figures`, people and tested models both left out of the fit."""
    logs = models != ""
    fold, predicted = rows.folds(logs, 3), np.zeros(len(models))
    for model in sorted(set(models[logs])):
        for k in range(3):
            test = (models == model) & (fold == k)
            predicted[test] = fit(rows, seen & (models != model) & (fold != k))[1][test]
            print(model, k, flush=True)
    items = [item for item, log in zip(rows.items, logs) if log]
    return sage_figures(items, rows.y[logs], models[logs], predicted[logs])


def trimmed(fitted: dict) -> dict:
    """One set of coefficients, rounded, without what weighs next to nothing; its phrases by weight."""
    words = {name: {key: round(float(w), 2) for key, w in row.items() if abs(w) >= 0.1}
             for name, row in fitted["words"].items()}  # fmt: skip
    order = sorted((name for name in words if words[name]), key=lambda name: -max(map(abs, words[name].values())))
    limits = {"limits": [round(x, 3) for x in fitted["limits"]]} if "limits" in fitted else {}
    features = {name: round(w, 2) for name, w in fitted["features"].items() if abs(w) > 0.005}
    return {"intercept": round(float(fitted["intercept"]), 3), **limits, "features": features,
            "words": {name: words[name] for name in order}}  # fmt: skip


def pretty(value, depth: int) -> str:
    """JSON with a line for each key of the outer `depth` levels."""
    if not isinstance(value, dict) or depth == 0:
        return json.dumps(value, ensure_ascii=False)
    rows = (f"{json.dumps(key, ensure_ascii=False)}: {pretty(inner, depth - 1)}" for key, inner in value.items())
    return "{\n" + ",\n".join(rows) + "\n}"


def save(fitted: dict, figures: dict, language: str, command: str) -> Path:
    """Write a language's fit into data/offline/, a line a feature and a phrase."""
    whole = {"made_by": command, "measured_on_unseen_people": figures}
    path = DATA / f"{language}_fit.json"
    path.write_text(pretty(whole | {name: trimmed(one) for name, one in fitted.items()}, 3) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("language", choices=("en", "zh", "check"))
    parser.add_argument("logs", nargs="*", help="SAGE's logs, for zh and check")
    args = parser.parse_args()
    language, command = args.language, f"python scripts/calibrate.py {args.language}"
    if bool(args.logs) == (language == "en"):
        parser.error(f"{language} {'reads no logs' if args.logs else 'wants the logs of a real user'}")
    if language == "check":
        return print(json.dumps(left_out(*chinese(args.logs)), indent=1))
    if language == "zh":
        rows, models, seen = chinese(args.logs)
        command += " SAGE_LOGS"
    else:
        rows, raw = judged("en.jsonl", "a")
        seen = np.array([row["split"] == "fit" for row in raw])
        shadow = {"made_by": command, **second_ear()}
        (DATA / "en_shadow.json").write_text(json.dumps(shadow).replace(', "', ',\n"') + "\n", encoding="utf-8")
        print("the second ear", shadow["measured_on_unseen_people"])
    fitted, predicted = fit(rows, seen)
    both = [(row["a"]["change"] + row["b"]["change"]) / 2 for _, row in read_rows(JUDGED / f"{language}.jsonl")
            if row["split"] == "validate"]
    real = np.array(both)
    figures = {"replies": int((~seen).sum()), "spearman": round(spearman(predicted[~seen], real), 3),
               "mean_error": round(float(abs(predicted[~seen] - real).mean()), 2)}  # fmt: skip
    print(figures, save(fitted, figures, language, command), user_hash())


if __name__ == "__main__":
    main()
