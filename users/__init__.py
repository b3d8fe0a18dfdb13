"""Who plays a person. `make_user` is the one place where the option `user` is decided.

`offline.py` has no language model (`fluency.py` is its ear), `llm_user.py` asks one, which by
`clients.py` is an endpoint or in our own engine. docs/simulators.md shows one in thirty lines.
"""

import dataclasses
import functools
from pathlib import Path

from chat import banned_ids, load_tokenizer, make_chat
from checkpoint import load_model
from config import Config
from dist import compute_type, pick_device
from engine import Engine, Sampling
from simulator import EmotionRules, User
from users.clients import Endpoint, Local, Record
from users.llm_user import LLMUser
from users.offline import OfflineUser, user_hash

USERS = {"offline": OfflineUser}  # those without a language model; made from rules and a mode


def make_user(config: Config, start: float, mode: str) -> User:
    """The simulated user of a config: SAGE's emotion rules with this start."""
    rules = EmotionRules(start=start)
    if config.user in USERS:
        return USERS[config.user](rules, mode)
    client = make_client(config)
    return LLMUser(client, rules, mode, config.prompts, config.one_call, config.user_retries)


def user_name(config: Config, mode: str) -> str:
    """Who the user is, for readers of a result: by version and data, or a model by name."""
    if config.user in USERS:
        return f"{config.user} {user_hash()}, {mode}"
    prompts = (config.prompts or "our prompts") + (", one call a turn" if config.one_call else "")
    model = f"{config.user} {config.user_model} at temperature {config.user_temperature:g}"
    return f"{model}, {prompts}, {mode}"


def make_client(config: Config) -> Endpoint | Local | Record:
    """The language model that plays the user, recorded or replayed where the config says so."""
    path = Path(config.record_file or Path(config.run) / "record.jsonl")
    known = {"model": "user_model", "temperature": "user_temperature", "max_tokens": "user_tokens"}
    settings = {name: getattr(config, key) for name, key in known.items()}
    if config.record == "replay":
        return Record(path, settings)
    client = connect(dataclasses.replace(config, record="off", record_file=""))
    return Record(path, settings, client) if config.record == "record" else client


@functools.lru_cache(maxsize=1)
def connect(config: Config) -> Endpoint | Local:
    """The live model behind `make_client`, which a run's evaluations share."""
    if config.user == "llm":
        endpoint = Endpoint(config)
        endpoint.probe()
        return endpoint
    chat, device = make_chat(load_tokenizer(config.user_model), think=False), pick_device(config)
    dtype = compute_type(config.user_dtype, device)
    model = load_model(config.user_model, config.seed, device, lambda model: model.to(dtype))
    banned = banned_ids(chat.tokenizer, model.config.vocab_size, (chat.end,))
    slots = config.user_concurrency * (1 if config.one_call else 2)  # one for each hop
    sampling = Sampling(banned, (chat.end,), config.user_temperature)
    engine = Engine(model, sampling, slots, config.user_context)
    return Local(engine, chat, config.user_tokens, config.user_concurrency)
