"""The recipes of CONTRIBUTING.md: each patch, taken from the page, applied to a copy of the repository and used."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATCHES = re.findall(r"^## (.*?)$.*?```diff\n(.*?)```", PAGE, re.S | re.M)
KINDS = ("A new user", "A new algorithm", "A new model family")


@pytest.fixture
def patched(tmp_path, request):
    """A copy of the repository with the patch of a recipe; `run` runs Python in it."""
    copy = tmp_path / "rlver"
    subprocess.run(["git", "init", "-q", str(copy)], check=True)
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file() and not name.startswith("docs/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    patch = dict(PATCHES)[request.param]
    done = subprocess.run(["git", "apply", "--recount", "-"], cwd=copy, input=patch.encode())
    if done.returncode:  # somebody has followed the recipe: then it is in
        undo = ["git", "apply", "--recount", "--reverse", "--check", "-"]
        subprocess.run(undo, cwd=copy, input=patch.encode(), check=True)

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("-m", "ruff", "check", ".")
    run("-m", "pytest", "-q", "tests/test_house.py", "-k", "imports or budgets", "-p", "no:cacheprovider")
    return copy, run


def trained(copy, run, *options):
    run("train.py", "configs/tiny.py", "steps=2", "threads=1", "run=run", "save_every=2", *options)
    rows = [[json.loads(line) for line in (copy / "run" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("metrics", "dialogues")]  # fmt: skip
    assert [row["skipped"] for row in rows[0]] == [0.0, 0.0] and all(row["policy/grad_norm"] > 0 for row in rows[0])
    return rows


def test_there_is_a_recipe_for_each_thing_that_people_add():
    assert tuple(name for name, _ in PATCHES) == KINDS


@pytest.mark.parametrize("patched", KINDS[:1], indirect=True)
def test_a_new_user_trains_and_its_rewards_are_its_own(patched):
    copy, run = patched
    _, dialogues = trained(copy, run, "user=curious", "eval_every=2")
    changes = {(said["content"].count("?") == 1, heard["planning"]["change"]) for row in dialogues
               for said, heard in zip(row["history"][1::2], row["history"][2::2])}  # fmt: skip
    assert changes and changes <= {(True, 8.0), (False, -4.0)}
    assert "0 mismatches" in run("eval.py", "verify", "run/dialogues.jsonl")
    assert "curious" in run("eval.py", "run", "run", "eval_max_turns=2", "threads=1", "out=new")


@pytest.mark.parametrize("patched", KINDS[1:2], indirect=True)
def test_a_new_algorithm_trains_and_its_advantages_are_right(patched):
    copy, run = patched
    to_go = {(0, 0): [0.9, 0.5], (0, 1): [0.1], (0, 2): [0.2], (1, 0): [1.0]}
    out = run("-c", f"import rloo; print(rloo.leave_one_out({to_go}))")
    found = {key: pytest.approx(value) for key, value in eval(out).items()}
    assert {(0, 0): [0.9 - 0.15, 0.0], (0, 1): [0.1 - 0.55], (0, 2): [0.2 - 0.5]} == found
    trained(copy, run, "algorithm=rloo", "group_size=3")


@pytest.mark.parametrize("patched", KINDS[2:], indirect=True)
def test_a_new_model_family_computes_what_transformers_computes(patched):
    _, run = patched
    out = run("-c", """
import torch, transformers
from checkpoint import load_model
from model import PackedAttention
config = transformers.SmolLM3Config(
    vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
torch.manual_seed(0)
theirs = transformers.SmolLM3ForCausalLM(config).eval()
for p in theirs.parameters():
    p.data.normal_(0, 0.2)
theirs.save_pretrained("smol")
ours, ids = load_model("smol"), torch.randint(264, (40,))
hidden = ours(ids, torch.arange(40), PackedAttention([0, 40], "cpu"))
gap = (hidden @ ours.output_weight.T - theirs(ids[None]).logits[0]).abs().max()
print(float(gap), float(theirs(ids[None]).logits.std()))
""")
    gap, size = map(float, out.split())
    assert gap < 1e-4 * size
