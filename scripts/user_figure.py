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
    shape = {"figsize": (5.5 + 4.5 * len(sets), 6.8), "width_ratios": [1] * (1 + len(sets))}
    figure, (left, *panels) = plt.subplots(1, 1 + len(sets), layout="constrained", **shape)
    fits = list(sets.values())
    order = sorted({key for fit in fits for key in fit["features"]}, key=lambda key: fits[0]["features"].get(key, 0.0))
    for n, (name, fit) in enumerate(sets.items()):
        places = np.arange(len(order)) + (0.4 * n - 0.2) * (len(sets) > 1)
        left.barh(places, [fit["features"].get(key, 0.0) for key in order], 0.8 / len(sets), label=name)
    left.set_yticks(range(len(order)), order, fontsize=8)
    left.legend(title="set of coefficients", fontsize=8)
    left.set_title("weight of a feature (0..1) for everybody", fontsize=10)
    for panel, (name, fit) in zip(panels, sets.items()):
        words: list[str] = []
        for key in INTENTIONS:
            own = sorted(fit["words"], key=lambda word: -fit["words"][word].get(key, 0.0))
            words += [word for word in own if word not in words][:EACH]
        table = np.array([[fit["words"][word].get(key, 0.0) for key in INTENTIONS] for word in words])
        image = panel.imshow(table, cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
        panel.set_xticks(range(len(INTENTIONS)), [*INTENTIONS], rotation=40, ha="right", fontsize=8)
        panel.set_yticks(range(len(words)), words, fontsize=8)
        panel.set_title(f"words by hidden intention, set {name}", fontsize=10)
    figure.colorbar(image, ax=panels, shrink=0.6)
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
