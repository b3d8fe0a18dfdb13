"""What tests share: tiny random models of every family, a byte tokenizer, profiles, and users that follow a script."""

import logging
import os
from pathlib import Path

import pytest
import torch

import kernels
from chat import banned_ids, load_tokenizer, make_chat
from checkpoint import init_weights
from engine import Engine, Sampling
from model import PackedAttention, Transformer
from rollout import Job, Stage, Talk
from simulator import Appraisal, EmotionRules, Failed, Profile, UserTurn

# It logs every tensor of every checkpoint, and pytest would print all of it below a failure.
logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False
torch.set_num_threads(1)  # tiny models: a second thread only waits
ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
RLVER_DATA = Path(os.environ.get("RLVER_DATA", ROOT.parent / "shared" / "data"))


def tiny_raw(family: str, tied: bool = True, vocab: int = 264) -> dict:
    """A config.json of a tiny random model; vocab 264 has five rows more than the byte tokenizer has ids."""
    architectures = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    raw = {
        "architectures": [architectures[family]],
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
    }
    return raw | ({"head_dim": 32} if family == "qwen3" else {})


def tiny_model(family: str = "qwen2", tied: bool = True, seed: int = 0) -> Transformer:
    """A tiny random model; biases and norms are random too, so that none of them can be left out unnoticed."""
    model = Transformer(tiny_raw(family, tied))
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def random_ids(length: int, seed: int = 0, vocab: int = 256) -> list[int]:
    """A document of random ids below `vocab`, none of them special to the byte tokenizer."""
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def hidden_states(model: Transformer, *documents: list[int]) -> torch.Tensor:
    """The training forward: hidden states [T, D] of documents packed side by side."""
    ends = torch.tensor([0, *(len(ids) for ids in documents)]).cumsum(0).tolist()
    position = torch.cat([torch.arange(len(ids)) for ids in documents])
    tokens = torch.tensor([token for ids in documents for token in ids])
    return model(tokens, position, PackedAttention(ends, tokens.device))


@pytest.fixture(autouse=True)
def one_library(monkeypatch):
    """Every test begins with MKL's products, and no run within this process measures others."""
    monkeypatch.setattr(kernels, "probe", lambda: (dict.fromkeys(kernels.USES, "mkl"), "in a test"))
    kernels.use("mkl")
    yield
    kernels.use("mkl")


class ScriptedUser:
    """Follows the user's protocol with a change of emotion computed by `change(key, turn, reply)` (or a Failed).

    `delay(key, turn)` says how many polls an answer takes. What each key was told is kept in `heard`.
    """

    def __init__(self, change=lambda key, turn, reply: 5.0, rules=None, delay=lambda key, turn: 0):
        self.rules, self.change, self.delay = rules or EmotionRules(), change, delay
        self.profiles, self.emotion, self.heard, self.queue = {}, {}, {}, []

    def start(self, key, profile, seed):
        self.queue = [item for item in self.queue if item[1] != key]
        self.profiles[key], self.emotion[key], self.heard[key] = profile, self.rules.start, []
        opening = UserTurn(profile.first_talk or f"Hello, I am {profile.id}.", self.rules.start)
        self.queue.append([self.delay(key, 0), key, opening])

    def tell(self, key, reply):
        self.heard[key].append(reply)
        turn = len(self.heard[key])
        change = self.change(key, turn, reply)
        if isinstance(change, Failed):
            answer = change
        else:
            emotion = self.emotion[key] = self.rules.step(self.emotion[key], change)
            appraisal = Appraisal("said", "served", "thought", "felt", change)
            text = f"{self.profiles[key].id} says {turn}"
            answer = UserTurn(text, emotion, appraisal, self.rules.change(change), self.rules.ending(emotion))
        self.queue.append([self.delay(key, turn), key, answer])

    def poll(self, timeout):
        ready = [(key, answer) for wait, key, answer in self.queue if wait <= 0]
        self.queue = [[wait - 1, key, answer] for wait, key, answer in self.queue if wait > 0]
        return ready


def make_profile(name: str, intention: str = "empathy", persona_type: str = "passive", **changes) -> Profile:
    """A small English profile with a first line."""
    values = dict(id=name, persona=f"{name}, 30, baker.", scene=f"I am {name}. My oven broke.", intention=intention,
                  persona_type=persona_type, language="en", first_talk=f"Hi, {name} here, my oven broke.")
    return Profile(**{**values, **changes})


def make_jobs(groups: int, members: int, **changes) -> list[Job]:
    """Jobs whose users can be told apart by name: a group's members differ in nothing else."""
    keys = [(group, member) for group in range(groups) for member in range(members)]
    return [Job(key, make_profile(f"User{key[0]}{key[1]}", **changes)) for key in keys]


def run_dialogues(jobs, engine, chat, user, talk, seed, *callbacks):
    """One rollout on a stage of its own."""
    return Stage(engine, chat, user, talk).hold(jobs, seed, *callbacks)


def make_talk(**changes) -> Talk:
    values = dict(systems={"en": "Be kind."}, max_turns=3, reply_tokens=8, strict_format=False)
    return Talk(**{**values, **changes})


def make_engine(
    chat, model=None, letters="abcd efg", slots=4, capacity=512, temperature=1.0, value_head=None
) -> Engine:
    """An engine of a tiny model; with `letters` it says nothing else, and <|im_end|> comes up within a few tokens."""
    banned = banned_ids(chat.tokenizer, 264, (chat.end,))
    if letters:
        banned[:] = True
        banned[[chat.end, *chat.text(letters)]] = False
    return Engine(model or tiny_model(), Sampling(banned, (chat.end,), temperature), slots, capacity, value_head)


@pytest.fixture
def one_thread():
    """Tiny tensors on a busy machine: a second thread makes them thirty times slower, waiting for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture
def chat(byte_tokenizer):
    return make_chat(byte_tokenizer, think=False)


@pytest.fixture
def think_chat(byte_tokenizer):
    return make_chat(byte_tokenizer, think=True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model's folder; `make test` makes it."""
    if not SMOLLM2.is_dir():
        pytest.fail(f"{SMOLLM2} is missing; run scripts/smollm2.py (make test does)")
    return SMOLLM2


@pytest.fixture(scope="session")
def released_data() -> Path:
    """The released profiles and logs; skipped where they are absent."""
    if not RLVER_DATA.is_dir():
        pytest.skip(f"the released data are not at {RLVER_DATA}; set RLVER_DATA")
    return RLVER_DATA
