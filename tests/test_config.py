"""Options: how a Config is filled, what it refuses and how it says so, and that every config of ours is sound."""

import dataclasses
import itertools
import json

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import train
from config import FIRST, SECTIONS, Config, InputError, apply, check, check_value, load_config, read_saved, save_config
from model import ModelConfig
from simulator import load_profiles

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SHAPES = sorted((ROOT / "configs" / "shapes").glob("*.json"))


def says(*fragments):
    """A context that wants an InputError of one line with all these fragments."""
    pattern = "".join(f"(?=.*{fragment})" for fragment in fragments)
    return pytest.raises(InputError, match=rf"\A{pattern}[^\n]*\Z")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_ours_loads_and_validates(path):
    server = [] if path.stem in ("demo", "demo_grpo", "tiny") else ["user_url=http://127.0.0.1:1/v1", "user_model=m"]
    config = load_config([str(path), *server])
    assert config.run == f"runs/{path.stem}" and config.user == ("llm" if server else "offline")
    assert check(config) == config
    assert path.read_text(encoding="utf-8").startswith('"""')
    assert len(load_profiles(ROOT / config.profiles)) >= config.groups


@pytest.mark.parametrize("name", ["ppo", "grpo", "ppo_think", "grpo_think", "ppo_1b", "ppo_lora_1gpu"])
def test_the_papers_commands_want_the_papers_kind_of_user(name):
    path = str(ROOT / f"configs/{name}.py")
    with says("'user_url'", "user=llm", "user_url=http", "user_model=NAME", "user=offline"):
        load_config([path])
    with says("'user_model'", "user=offline"):
        load_config([path, "user_url=http://127.0.0.1:1/v1"])
    assert load_config([path, "user=offline"]).user == "offline"


def test_the_ablations_are_configs():
    """{ppo, grpo} x {think, no think} x {vanilla, challenging users}."""
    found = {}
    for path in CONFIGS:
        config = load_config([str(path), "user=offline"])
        if config.model.endswith("7B-Instruct") and not config.lora_rank:
            found[config.algorithm, config.think, config.user_mode] = path.stem
    assert len(found) == 8 and set(found) == set(
        itertools.product(("ppo", "grpo"), (False, True), ("vanilla", "challenging")))  # fmt: skip
    page = (ROOT / "docs/ablations.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in page for name in found.values())


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_every_shape_is_a_model_we_can_compute(path):
    shape = ModelConfig.from_hf(json.loads(path.read_text()), str(path))
    assert shape.num_heads % shape.num_kv_heads == 0


def test_options_override_the_file_and_keep_their_types():
    config = load_config(
        [str(ROOT / "configs/tiny.py"), "lr=2e-5", "--seed=7", "think=yes", "run=somewhere", "steps=3", "system=a=b"]
    )
    assert (config.lr, config.seed, config.think, config.run, config.steps) == (2e-5, 7, True, "somewhere", 3)
    assert config.system == "a=b", "only the first = separates"
    assert config.tokenizer == "bytes", "what the file sets and nobody overrides stays"
    assert load_config([]).run == "runs/default"


@pytest.mark.parametrize(
    "text, value", [("true", True), ("1", True), ("Yes", True), ("false", False), ("0", False), ("NO", False)]
)
def test_truth_values(text, value):
    assert apply(Config(), {"think": text}).think is value


@pytest.mark.parametrize(
    "option, fragments",
    [
        ("steps=many", ["'steps'", "whole number", "'many'", "steps="]),
        ("steps=1.5", ["'steps'", "whole number"]),
        ("lr=fast", ["'lr'", "a number", "'fast'"]),
        ("think=maybe", ["'think'", "true or false"]),
        ("algorithm=gpro", ["'algorithm'", "ppo, grpo", "did you mean 'grpo'"]),
        ("stpes=3", ["'stpes'", "did you mean 'steps'"]),
        ("learning_rate=3", ["'learning_rate'"]),
        ("xyzzy=3", ["'xyzzy'", "--help"]),
        ("top_p=0.9", ["'top_p'"]),
    ],
)
def test_a_wrong_option_is_one_line_with_the_key_and_a_hint(option, fragments):
    with says(*fragments):
        load_config([option])


@pytest.mark.parametrize(
    "options, fragments",
    [
        (["algorithm=grpo", "group_size=1"], ["'group_size'", "at least 2", "algorithm=ppo"]),
        (["lora_rank=4", "lora_targets=q_proj,o"], ["'lora_targets'", "o_proj", "'q_proj,o'"]),
        (["lora_rank=4", "lora_alpha=0"], ["'lora_alpha'", "above 0"]),
        (["shard=-1"], ["'shard'", "negative"]),
        (["reply_tokens=512", "context_tokens=512"], ["'reply_tokens'", "'context_tokens'"]),
        (["groups=1", "group_size=2", "minibatches=3"], ["'minibatches'", "3", "2"]),
        (["group_size=4", "groups=1", "learn_from=2", "minibatches=3"], ["'minibatches'", "3", "2"]),
        (["learn_from=1"], ["'learn_from'", "at least 2"]),
        (["learn_from=5", "group_size=4"], ["'learn_from'", "'group_size'", "4"]),
        (["steps=0"], ["'steps'", "at least 1"]),
        (["keep=0"], ["'keep'", "at least 1"]),
        (["temperature=0"], ["'temperature'", "above 0"]),
        (["lr=nan"], ["'lr'"]),
        (["clip=-0.1"], ["'clip'"]),
        (["kl_coef=-1"], ["'kl_coef'", "negative"]),
        (["gamma=1.1"], ["'gamma'", "0..1"]),
        (["lam=-0.1"], ["'lam'"]),
        (["start_emotion=9"], ["'start_emotion'", "10..99"]),
        (["eval_start_emotion=100"], ["'eval_start_emotion'"]),
    ],
)
def test_impossible_values_and_combinations(options, fragments):
    with says(*fragments):
        load_config(options)


FLOATS = [f.name for f in dataclasses.fields(Config) if f.type is float]


@pytest.mark.parametrize("key", FLOATS)
def test_nan_is_no_number(key):
    with says(f"'{key}'"):
        load_config([f"{key}=nan"])


def test_the_limits_themselves_are_allowed():
    load_config(
        [
            "algorithm=grpo",
            "group_size=2",
            "gamma=0",
            "lam=1",
            "start_emotion=10",
            "eval_start_emotion=99",
            "save_every=0",
        ]
    )
    load_config(["groups=1", "group_size=1", "minibatches=1", "reply_tokens=511", "context_tokens=512"])
    load_config(["groups=1", "group_size=3", "learn_from=3", "minibatches=3"])


@pytest.mark.parametrize(
    "text, fragments",
    [
        ("from config import Config\nconfig = Config(stpes=3)\n", ["stpes", "did you mean 'steps'"]),
        ("from config import Config\nconfig = Config(steps='3')\n", ["'steps'", "int", "str"]),
        ("from config import Config\nconfig = Config(steps=2.0)\n", ["'steps'", "int", "float"]),
        ("from config import Config\nconfig = Config(think=1)\n", ["'think'", "bool", "int"]),
        ("from config import Config\nconfig = Config(\n", ["SyntaxError"]),
        ("config = Config()\n", ["NameError"]),
        ("import no_such_module_of_ours\n", ["no_such_module_of_ours"]),
        ("from config import Config\nconfig = Config(steps=1 // 0)\n", ["ZeroDivisionError"]),
        ("settings = 3\n", ["config = Config"]),
    ],
    ids=[
        "unknown key",
        "text",
        "float",
        "whole number as truth",
        "syntax",
        "name",
        "import",
        "division by zero",
        "nothing",
    ],
)
def test_a_wrong_config_file_is_one_line_too(tmp_path, text, fragments):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with says(*fragments):
        load_config([str(path)])


def test_a_whole_number_serves_where_a_float_is_wanted(tmp_path):
    (tmp_path / "mine.py").write_text("from config import Config\nconfig = Config(temperature=1, run='r')\n")
    config = load_config([str(tmp_path / "mine.py")])
    assert type(config.temperature) is float


def test_files_are_named_that_are_missing_or_too_many():
    with says("configs/nothing.py", "no such config file"):
        load_config(["configs/nothing.py"])
    with says("b.py", "one config file"):
        load_config(["a.py", "b.py"])


@pytest.mark.parametrize("main", [train.main, evaluation.main], ids=["train", "eval"])
def test_help_names_every_option_with_default_and_meaning(main, capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    for f in dataclasses.fields(Config):
        default = repr(f.default) if isinstance(f.default, str) else str(f.default)
        assert words.count(f" {f.name} {f.metadata['meaning']} [{default}]") == 1, f.name
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["what most runs set:", *(f"{title}:" for title in SECTIONS.values())]
    assert set(SECTIONS) | set(FIRST) <= {f.name for f in dataclasses.fields(Config)} and len(FIRST) == 12
    assert max(map(len, shown.splitlines()[1:])) <= 100


def test_every_options_bounds_hold_where_it_is_declared():
    """Just outside each bound is refused, the bound itself is not (but for `above`)."""
    for f in dataclasses.fields(Config):
        low, high, above = (f.metadata[key] for key in ("low", "high", "above"))
        for value, good in ((low, True), (high, True), (above, False)):
            if value is not None:
                outside = value - 1 if value != high else value + 1
                kind = f.type
                with says(f"'{f.name}'"):
                    check_value(f, kind(value if not good else outside))
                if good:
                    check_value(f, kind(value))


def test_every_option_is_a_plain_value_of_its_type():
    for f in dataclasses.fields(Config):
        assert f.type in (str, int, float, bool), f.name
        assert type(f.default) is f.type, f.name
        assert not f.metadata["choices"] or f.default in f.metadata["choices"], f.name


@given(lr=st.floats(1e-9, 1.0), seed=st.integers(0, 2**62), think=st.booleans(), system=st.text(max_size=20))
def test_a_saved_config_comes_back_the_same(tmp_path_factory, lr, seed, think, system):
    path = tmp_path_factory.mktemp("saved") / "config.json"
    config = Config(run="runs/x", lr=lr, seed=seed, think=think, system=system, algorithm="grpo")
    save_config(config, path)
    assert read_saved(path) == config
    assert set(json.loads(path.read_text())) == {f.name for f in dataclasses.fields(Config)}


def test_a_saved_config_of_another_version_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"kl": "reward", "lr": 0.1}')
    with says("config.json", "'kl'", "this version", "env.txt"):
        read_saved(path)


@pytest.mark.parametrize("text", ["", "{", '{"nonsense": 1}', '{"steps": "many"}', "[1]"])
def test_a_damaged_saved_config_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError):
        read_saved(path)
