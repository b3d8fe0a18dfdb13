"""What the offline user rewards, as a figure: its features' weights, and the words that each hidden intention likes.

    python scripts/user_figure.py en docs/offline_user.png

Weights are those of data/offline/en_fit.json or zh_fit.json; they add to the log-odds of a good reply.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from simulator import INTENTIONS  # noqa: E402
from users.offline import lexicon  # noqa: E402

EACH = 4  # words shown for an intention


def draw(sets: dict[str, dict], png: Path) -> None:
    """Bars of the features in each set, and in colours the words that one intention weighs unlike the others."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6.4), layout="constrained", width_ratios=(1, 1.2))
    fit = sets["able"]
    order = sorted(fit["features"], key=fit["features"].get)
    for n, (name, one) in enumerate(sets.items()):
        places = np.arange(len(order)) + (0.4 * n - 0.2) * (len(sets) > 1)
        left.barh(places, [one["features"].get(key, 0.0) for key in order], 0.8 / len(sets), label=name)
    left.set_yticks(range(len(order)), order)
    left.legend(title="set of coefficients", fontsize=8)
    left.tick_params(labelsize=8)
    left.set_title("weight of a feature (0..1) for everybody", fontsize=10)
    words = []
    for key in INTENTIONS:
        own = sorted(fit["words"], key=lambda word: -fit["words"][word].get(key, 0.0))
        words += [word for word in own if word not in words][:EACH]
    table = np.array([[fit["words"][word].get(key, 0.0) for key in INTENTIONS] for word in words])
    limit = abs(table).max()
    image = right.imshow(table, cmap="RdYlGn", vmin=-limit, vmax=limit, aspect="auto")
    right.set_xticks(range(len(INTENTIONS)), [*INTENTIONS], rotation=40, ha="right", fontsize=8)
    right.set_yticks(range(len(words)), words, fontsize=8)
    right.set_title("weight of a word by hidden intention, beside that for everybody (able)", fontsize=10)
    figure.colorbar(image, ax=right, shrink=0.6)
    figure.savefig(png, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("language", choices=("en", "zh"))
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    fit = lexicon(args.language).fit
    draw({name: fit[name] for name in ("able", "small") if name in fit}, args.png)


if __name__ == "__main__":
    main()
