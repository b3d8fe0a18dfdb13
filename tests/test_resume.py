"""A run that is stopped, by a signal, a crash or its last step, goes on as if nothing had been: to the bit."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import argv, assert_same_run, go, lowercase, metrics, restored, tiny_runs, user  # noqa: F401
from safetensors.torch import load_file

import eval as evaluation
import rundir
import train
from checkpoint import check_files, checkpoints, load_checkpoint, save_checkpoint
from config import InputError, add_rows
from dist import World
from update import build

KINDS = {
    "ppo-head": dict(eval_every=2),
    "ppo-onednn": dict(matmul="onednn"),
    "ppo-trunk": dict(critic="trunk", minibatches=2),
    "grpo": dict(algorithm="grpo", kl_coef=0.01),
}


@pytest.mark.parametrize("kind", KINDS)
def test_four_steps_are_two_and_two_more_to_the_bit(tiny, kind):
    straight, halved = tiny("straight", **KINDS[kind]), tiny("halved", **KINDS[kind])
    go(straight)
    go(dataclasses.replace(halved, steps=2))
    go(halved)
    assert_same_run(straight, halved, 4)
    assert len({row["reward/mean"] for row in metrics(halved)}) > 1, "a run in which nothing moves proves nothing"


def test_what_was_logged_behind_the_checkpoint_is_cut_back(tiny):
    """A crash between two checkpoints leaves later lines, and perhaps half a character of one."""
    straight, crashed = tiny("straight"), tiny("crashed")
    go(straight)
    go(dataclasses.replace(crashed, steps=2))
    for name in ("metrics.jsonl", "dialogues.jsonl"):
        with open(Path(crashed.run) / name, "ab") as file:
            file.write('{"step": 3, "was": "before the crash"}\n{"step": 4, "text": "你'.encode()[:-1])
    go(crashed)
    assert_same_run(straight, crashed, 4)


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    """U+2028 and U+0085 stand raw in a dialogue when the policy samples them; str.splitlines would cut there."""
    path = tmp_path / "dialogues.jsonl"
    rows = [{"step": step, "text": "one\u2028two\u0085three"} for step in (1, 2, 3)]
    add_rows(path, rows)
    rundir.cut_back(path, 2)
    assert path.read_text(encoding="utf-8") == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:2])


def test_a_finished_run_says_so_and_is_left_alone(tiny, capsys):
    config = tiny(steps=1)
    go(config)
    before = {path: path.read_bytes() for path in Path(config.run).rglob("*") if path.is_file()}
    assert go(config) == Path(config.run) / "model"
    assert "is finished: 1 steps" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in Path(config.run).rglob("*") if path.is_file()}


def test_going_back_to_an_older_checkpoint_forgets_the_newer_ones(tiny):
    """Else the next resume=auto would go on from the abandoned branch."""
    config = tiny(steps=6, keep=3)
    go(config)
    back = dataclasses.replace(config, resume=f"{config.run}/ckpt/step_2", save_every=0)
    with pytest.raises(train.Stop):
        go(back, signalling_user(signal.SIGINT, after=24))
    assert [folder.name for folder in checkpoints(Path(config.run))][-1] == "step_3"
    assert [row["step"] for row in metrics(config)] == [1, 2, 3]


def test_what_a_stopped_run_says_to_type_does_not_go_back_to_an_old_checkpoint(tiny, monkeypatch, capsys):
    config = tiny(steps=6, keep=3)
    go(config)
    back = dataclasses.replace(config, resume=f"{config.run}/ckpt/step_2", steps=7)
    monkeypatch.setattr(train, "make_user", lambda config, start, mode: signalling_user(signal.SIGINT, 20))
    assert train.main(argv(back)) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert "go on with: python train.py" in said and "resume=" not in said and "steps=7" in said


# A kill while saving.


DYING = """
import os, sys
sys.path.insert(0, {root!r})
import train
real = os.fsync if {stage!r} != "rename" else os.replace
def dying(what, *more):
    name = str(what) if more else os.readlink(f"/proc/self/fd/{{what}}")
    if "step_4" in name and {{"shard": ".safetensors", "state": "state.json"}}.get({stage!r}, "") in name:
        os._exit(9)
    return real(what, *more)
setattr(os, "replace" if {stage!r} == "rename" else "fsync", dying)
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("stage", ["shard", "state", "rename"])
def test_a_kill_during_the_save_is_harmless(tiny, stage):
    """The process dies as it syncs a shard of step 4, as it syncs the state, as it renames the folder."""
    straight, config = tiny("straight"), tiny()
    train.train(straight)  # meets the offline user, as the process does
    code = DYING.format(root=str(ROOT), stage=stage)
    died = subprocess.run([sys.executable, "-c", code, *argv(config)], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    run = Path(config.run)
    assert [folder.name for folder in checkpoints(run)] == ["step_2"] and (run / "ckpt" / "step_4.partial").is_dir()
    train.train(config)
    assert_same_run(straight, config, 4, passed_over=["rng"])  # torch's own state as a process begins
    assert not list(run.rglob("*.partial"))


def test_leftovers_of_an_earlier_kill_are_cleaned(tiny):
    """Each is as large as a checkpoint; nobody else would ever remove them."""
    config = tiny()
    go(dataclasses.replace(config, steps=2))
    for name in ("ckpt/step_3.partial", "model.partial", "model.old"):
        (Path(config.run) / name).mkdir(parents=True)
        (Path(config.run) / name / "policy.safetensors").write_bytes(b"half")
    go(config)
    assert not [path for path in Path(config.run).rglob("*") if path.suffix in (".partial", ".old")]
    assert "policy.safetensors" not in os.listdir(Path(config.run) / "model")


def test_optimiser_states_are_told_apart_by_name(tiny):
    config = tiny(critic="trunk", steps=1)
    go(config)
    state = build(dataclasses.replace(config, seed=5), World())
    assert load_checkpoint(Path(config.run) / "ckpt" / "step_1", state.modules, state.optimisers) == 1
    again = save_checkpoint(Path(config.run) / "copy", 1, state.modules, state.optimisers, World())
    for file in again.glob("*.safetensors"):
        one, other = load_file(file), load_file(Path(config.run) / "ckpt" / "step_1" / file.name)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Signals.


def signalling_user(number, after):
    """A user that sends this process a signal when it hears its `after`-th reply."""
    heard = Counter()

    def change(key, turn, reply):
        heard["replies"] += 1
        if heard["replies"] == after:
            os.kill(os.getpid(), number)
        return lowercase(key, turn, reply)

    return user(change)


@pytest.mark.parametrize("after", [2, 26], ids=["first-step", "second-step"])
def test_a_signal_during_a_rollout_saves_the_last_step_and_goes_on(tiny, monkeypatch, capsys, after):
    straight, config = tiny("straight"), tiny(save_every=0)
    go(straight)
    monkeypatch.setattr(train, "make_user", lambda config, start, mode: signalling_user(signal.SIGINT, after))
    torch.manual_seed(0)
    assert train.main(argv(config)) == 130
    done = after // 16
    assert [folder.name for folder in checkpoints(Path(config.run))] == [f"step_{done}"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert "SIGINT" in said and f"Saved in {config.run}/ckpt" in said and "go on with: python train.py" in said
    go(config)
    assert_same_run(straight, config, 4)


def test_a_signal_during_an_update_lets_it_finish(tiny, monkeypatch):
    straight, config = tiny("straight"), tiny(save_every=0)
    go(straight)
    with monkeypatch.context() as patch, pytest.raises(train.Stop) as stop:
        patch.setattr(train, "update", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or real(*args))
        real = sys.modules["update"].update
        go(config)
    assert stop.value.code == 143
    assert [folder.name for folder in checkpoints(Path(config.run))] == ["step_1"]
    assert [row["step"] for row in metrics(config)] == [1]
    go(config)
    assert_same_run(straight, config, 4)


def test_a_signal_during_an_evaluation_loses_nothing_of_the_step(tiny, monkeypatch):
    straight, config = tiny("straight", eval_every=2), tiny(eval_every=2)
    go(straight)
    with monkeypatch.context() as patch, pytest.raises(train.Stop):
        patch.setattr(evaluation, "make_user", lambda config, start, mode: signalling_user(signal.SIGINT, 3))
        go(config)
    go(config)
    assert [row["step"] for row in metrics(config)] == [1, 2, 3, 4]
    assert_same_run(straight, config, 4)


def test_the_signal_handlers_are_given_back(tiny):
    """Else Ctrl-C does nothing to a program that has called train(), nor while the model is being saved."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    go(tiny(steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_while_the_model_is_saved_lets_the_save_finish(tiny, monkeypatch, capsys):
    config = tiny(steps=1)
    with monkeypatch.context() as patch, pytest.raises(train.Stop) as stop:
        patch.setattr(train, "save_model", lambda *args: os.kill(os.getpid(), signal.SIGINT) or real(*args))
        real = sys.modules["checkpoint"].save_model
        go(config)
    assert stop.value.code == 130
    assert {"config.json", "model.safetensors"} <= set(os.listdir(Path(config.run) / "model"))
    go(config)
    assert "is finished: 1 steps" in capsys.readouterr().out


def command(config):
    """train.py with this config in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, config, step):
    """Until the run has logged `step` steps."""
    log = Path(config.run) / "metrics.jsonl"
    while not log.is_file() or log.read_text().count("\n") < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_a_process_that_is_interrupted_and_one_that_is_killed_go_on_to_the_same_weights(tiny):
    """SIGINT (exit code 130), then SIGKILL at a random moment around the saves: as if nothing had been."""
    straight, config = tiny("straight", steps=12, save_every=1), tiny(steps=12, save_every=1)
    train.train(straight)  # meets the offline user, as the processes do
    process = command(config)
    wait_for_step(process, config, 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    done = len(metrics(config))
    process = command(config)
    wait_for_step(process, config, min(12, done + 1))
    delay = random.Random().uniform(0, 0.5)
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=60)
    train.train(config)
    assert_same_run(straight, config, 12, passed_over=["rng"])  # torch's own state as a process begins
    assert [row["step"] for row in metrics(config)] == list(range(1, 13)), f"killed after {delay} s"


# Damage.


def damage(folder, how):
    [shard] = folder.glob("*.safetensors")
    if how == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif how == "missing":
        shard.unlink()
    else:
        (folder / "state.json").write_text("{")


@pytest.mark.parametrize("how", ["truncated", "missing", "state"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_with_a_warning(tiny, capsys, how):
    straight, config = tiny("straight"), tiny()
    for each in (straight, config):
        go(each)
    run = Path(config.run)
    damage(run / "ckpt" / "step_4", how)
    shutil.rmtree(run / "model")
    go(config)
    said = capsys.readouterr().err
    assert f"warning: {run / 'ckpt' / 'step_4'}" in said and f"going back to {run / 'ckpt' / 'step_2'}" in said
    assert (run / "ckpt" / "step_4.damaged").is_dir(), "kept, in case only the disk was away for a moment"
    assert_same_run(straight, config, 4)


def test_where_every_checkpoint_is_damaged_nothing_is_begun_again(tiny):
    """Else a run of days would be overwritten by its own first step."""
    config = tiny()
    go(config)
    before = (Path(config.run) / "metrics.jsonl").read_bytes()
    for folder in checkpoints(Path(config.run)):
        damage(folder, "truncated")
    with pytest.raises(InputError, match="no sound one"):
        go(config)
    assert (Path(config.run) / "metrics.jsonl").read_bytes() == before


def test_the_checkpoint_with_the_best_evaluation_is_kept_and_made_if_it_was_not_due(tiny, monkeypatch):
    """Scores of the evaluations after steps 1 to 6: the best is step 3's, at which no checkpoint was due."""
    scores = iter([10.0, 20.0, 90.0, 30.0, 90.0, 50.0])
    real = train.write_evaluation

    def scored(*args):
        return {**real(*args), "score": next(scores)}

    monkeypatch.setattr(train, "write_evaluation", scored)
    config = tiny(steps=6, eval_every=1, save_every=2, keep=1)
    go(config)
    assert [folder.name for folder in checkpoints(Path(config.run))] == ["step_3", "step_6"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint_intact(tiny, small_disk):
    """One checkpoint of 2 MB fits, a second beside it and the logs do not. With room again the run goes on."""
    straight, config = tiny("straight", save_every=1, keep=1, steps=9), tiny(save_every=1, keep=1, steps=9)
    train.train(straight)
    config = dataclasses.replace(config, run=str(small_disk / "run"))
    filler = small_disk / "filler"
    process = command(config)
    wait_for_step(process, config, 2)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler.write_bytes(bytes(max(0, free - 400_000)))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    last = said.strip().splitlines()[-1]
    assert "No space left on device" in last and "Make room, then go on with: python train.py" in last
    [kept] = checkpoints(Path(config.run))
    assert f"the last good checkpoint is {kept}" in last and check_files(kept) == int(kept.name[5:])
    assert "Traceback" not in said
    filler.unlink()
    train.train(config)
    assert_same_run(straight, config, 9, passed_over=["rng"])


def test_any_checkpoint_is_exported_as_a_hugging_face_folder(tiny, tmp_path, capsys):
    config = tiny()
    model = go(config)
    out = tmp_path / "out"
    assert evaluation.main(["export", f"{config.run}/ckpt/step_4", str(out)]) == 0
    assert "as a Hugging Face folder" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == sorted(os.listdir(model))
    one, other = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match="exists already"):
        evaluation.main(["export", f"{config.run}/ckpt/step_4", str(out)])
    with pytest.raises(InputError, match="no such checkpoint"):
        evaluation.main(["export", f"{config.run}/ckpt/step_9", str(tmp_path / "other")])


def test_a_run_that_another_process_trains_in_is_refused(tiny):
    """Started twice, or a rank that outlived a killed torchrun: both would write the same files."""
    config = tiny(steps=200, save_every=1)
    process = command(config)
    wait_for_step(process, config, 1)
    with pytest.raises(InputError, match=f"process {process.pid} on .* is training in it"):
        go(config)
    process.kill()
    process.communicate(timeout=60)
    go(dataclasses.replace(config, steps=metrics(config)[-1]["step"] + 1))
