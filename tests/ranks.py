"""What each rank does in the tests of several ranks: run by torchrun, results into a folder. See test_dist.py.

    torchrun --nproc-per-node 2 tests/ranks.py JOB FOLDER
"""

import json
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from chat import banned_ids  # noqa: E402
from checkpoint import save_model  # noqa: E402
from config import Config  # noqa: E402
from dist import World, close, gathered, local, make_replica, refill, rows, start, whole  # noqa: E402
from engine import Engine, Sampling  # noqa: E402
from model import PackedAttention  # noqa: E402
from update import build, update  # noqa: E402


def disturb(state):
    """The same noise on every trained tensor, however it is sharded, so that no gradient is zero by construction."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in state.modules.values():
            for parameter in module.parameters():
                noise = 0.05 * torch.randn(parameter.shape, generator=generator)
                if parameter.requires_grad:
                    local(parameter).add_(noise[rows(parameter)] if parameter.dim() else noise)


def one_update(config: Config, dialogues, banned, world: World):
    """Gradients and changes of every trained tensor, whole, by name, of one `update` of a disturbed state; metrics."""
    state = build(config, world)
    disturb(state)
    named = {f"{key}.{n}": p for key, m in state.modules.items() for n, p in m.named_parameters() if p.requires_grad}
    before, gradients = {name: whole(p).clone() for name, p in named.items()}, {}
    names = {id(p): name for name, p in named.items()}

    def note(optimiser, args, kwargs):
        owned = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        gradients.update({names[id(p)]: whole(p.grad).clone() for p in owned})

    for optimiser in state.optimisers:
        optimiser.register_step_pre_hook(note)
    metrics = update(state, config, dialogues, banned, world)
    changes = {name: whole(p) - before[name] for name, p in named.items()}
    return state, gradients, changes, metrics


def job_updates(folder: Path) -> None:
    """Every case of cases.pkl: (name, config, dialogues)."""
    cases, banned = pickle.loads((folder / "cases.pkl").read_bytes())
    for name, config, dialogues in cases:
        world = start(config)
        _, gradients, changes, metrics = one_update(config, dialogues, banned, world)
        if world.main:
            save_file({f"grad:{n}": t.contiguous() for n, t in gradients.items()}
                      | {f"change:{n}": t.contiguous() for n, t in changes.items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(metrics))


def job_generation(folder: Path) -> None:
    """Ranks decode different numbers of steps with gathered weights, then take a training step all the same.

    A replica, refilled from the shards, computes what the gathered policy does.
    """
    cases, banned = pickle.loads((folder / "cases.pkl").read_bytes())
    name, config, dialogues = cases[0]
    world = start(config)
    state = build(config, world)
    disturb(state)
    engine = Engine(state.policy, Sampling(banned), 2, 64)
    found = []
    for _ in range(2):
        with gathered(state.policy, world):
            engine.forget()
            for slot in range(2):
                engine.submit(slot, [1, 2, 3], (world.rank, slot), 4 + 7 * world.rank)
            while engine.busy:
                found += [row.sampled for row in engine.step()]
        replica = make_replica(state.policy, config, world)
        refill(replica, state.policy)
        with gathered(state.policy, world), torch.no_grad():
            ids, attend = torch.arange(20), PackedAttention([0, 20], world.device)
            assert torch.equal(replica(ids, ids, attend), state.policy(ids, ids, attend))
        metrics = update(state, config, dialogues, banned, world)
        assert metrics["skipped"] == 0
    (folder / f"sampled_{world.rank}.json").write_text(json.dumps(found))


def job_save(folder: Path) -> None:
    """A sharded model with an adapter, or without, written as a Hugging Face folder."""
    from chat import load_tokenizer

    cases, _ = pickle.loads((folder / "cases.pkl").read_bytes())
    for name, config, _ in cases:
        world = start(config)
        state = build(config, world)
        disturb(state)
        save_model(state.policy, load_tokenizer("bytes"), folder / name, world.main)


def tiny_banned(vocab: int = 264):
    from chat import load_tokenizer, make_chat

    chat = make_chat(load_tokenizer("bytes"), False)
    return banned_ids(chat.tokenizer, vocab, (chat.end,))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"updates": job_updates, "generation": job_generation, "save": job_save}[sys.argv[1]](Path(sys.argv[2]))
    if dist.is_initialized():
        dist.barrier()
    close()
