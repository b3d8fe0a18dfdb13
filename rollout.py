"""From profiles to packed batches: many dialogues at once, their trajectories, and their packing.

`Stage.hold` is where the policy (an Engine) and users meet; no dialogue waits for the slowest one.
Everything is keyed by dialogue, (group, member), never by position in a list. Trajectories are made
from the very ids that were rendered and sampled. `update.py` learns from them.
"""

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from chat import Chat, Reply, banned_ids, system_prompt
from config import Config
from engine import Engine, Row, Sampling
from model import PackedAttention, Transformer, ValueHead, predictors
from simulator import EXCLUDED, Failed, Key, Profile, User, UserTurn, band, hash_key

MAX_FAILED = 0.25  # with a larger share of failed users a step or a benchmark does not count
TURN_STREAM, USER_STREAM = 0, 1  # keep the noise of the policy's turns and the users' seeds apart


@dataclass
class Turn:
    """A reply of the policy and the user's answer, None until it comes or if none is asked for."""

    prompt_ids: list[int]
    sampled_ids: list[int]
    logps: list[float]  # the sampler's own, one per sampled id
    values: list[float]  # likewise; zeros where the engine has no value head
    reply: Reply
    stop: str  # eos | cap | context
    user: UserTurn | None = None


def next_prompt(chat: Chat, last: Turn, said: str) -> list[int]:
    """Ids up to the reply to `said`, behind a turn: its own ids, without its thought."""
    kept = last.reply.ids if chat.think else last.sampled_ids
    return [*last.prompt_ids, *kept, *chat.glue(kept), *chat.user_turn(said)]


@dataclass
class Dialogue:
    """One talk between the policy and one simulated user.

    `ended` is "" while it runs, then content | left (emotion below 10) | goodbye | max_turns |
    context_full | format | failed (the user could not answer; `why` has the reason).
    """

    key: Key
    profile: Profile
    seed: int
    opening: UserTurn | None = None
    turns: list[Turn] = field(default_factory=list)
    ended: str = ""
    why: str = ""

    @property
    def completed(self) -> bool:
        """Whether it counts: in rewards, baselines, whitening and denominators."""
        return bool(self.ended) and self.ended != EXCLUDED

    @property
    def emotion(self) -> float:
        """The user's last known emotion, 0..100. Raises ValueError unless `completed`."""
        if not self.completed:
            state = f"{self.ended or 'still running'} {self.why}"
            raise ValueError(f"dialogue {self.key} has no final emotion: {state}")
        return [self.opening, *(turn.user for turn in self.turns if turn.user)][-1].emotion

    @property
    def reward(self) -> float:
        """Final emotion / 100 (RLVER, section 2); 0 where a think reply broke the format."""
        return 0.0 if self.ended == "format" else self.emotion / 100


def token_rewards(dialogue: Dialogue, credit: str) -> list[float]:
    """What each of the dialogue's sampled tokens is paid.

    "final" puts the reward on the last token (RLVER). "turn" puts each turn's change of emotion on
    its last, and pays nobody for what the dialogue began with: the same objective at gamma = 1, but
    no reply is blamed for what happened before it.
    """
    known = [u.emotion / 100 for u in (dialogue.opening, *(t.user for t in dialogue.turns[:-1]))]
    rewards = []
    for turn, last, now in zip(dialogue.turns, known, [*known[1:], dialogue.reward]):
        rewards += [0.0] * (len(turn.sampled_ids) - 1) + [now - last]
    return rewards if credit == "turn" else [0.0] * (len(rewards) - 1) + [dialogue.reward]


@dataclass(frozen=True)
class Talk:
    """How dialogues are held. `strict_format` ends one on a malformed think reply (in training)."""

    systems: dict[str, str]  # the policy's system prompt by language
    max_turns: int
    reply_tokens: int
    strict_format: bool
    appraise_last: bool = True  # SAGE generates a last reply that nobody appraises


def make_talk(config: Config, training: bool) -> Talk:
    """How dialogues are held in training, or in the benchmark."""
    return Talk(
        systems={lang: system_prompt(lang, config.think, config.system) for lang in ("en", "zh")},
        max_turns=config.max_turns if training else config.eval_max_turns,
        reply_tokens=config.reply_tokens, strict_format=training and config.strict_format,
        appraise_last=training,
    )  # fmt: skip


def make_engine(config: Config, model: Transformer, chat: Chat, dialogues: int,
                value_head: ValueHead | None = None) -> Engine:  # fmt: skip
    """An engine for this model with no more slots than there are dialogues."""
    banned = banned_ids(chat.tokenizer, model.config.vocab_size, (chat.end,))
    sampling = Sampling(banned, (chat.end,), config.temperature)
    slots = max(1, min(config.slots, dialogues))
    return Engine(model, sampling, slots, config.context_tokens, value_head)


@dataclass(frozen=True)
class Job:
    """A dialogue to be held."""

    key: Key
    profile: Profile


class Stage:
    """Where a policy and its users meet: made once, it holds any number of rollouts.

    Its state during a rollout is which dialogue sits in which slot; each method handles one event.
    """

    def __init__(self, engine: Engine, chat: Chat, user: User, talk: Talk):
        self.engine, self.chat, self.user, self.talk = engine, chat, user, talk

    def hold(self, jobs: list[Job], seed: tuple[int, ...], progress=None, on_end=None,
             check=None) -> list[Dialogue]:  # fmt: skip
        """Hold all the dialogues, more than slots if need be; returned in key order.

        All noise of a dialogue follows from its key and `seed`, for example (seed, step). A profile
        without a first line gets one from its user, once for the whole group. `progress(n)` is
        called when n more of the len(jobs) * max_turns replies are done or no longer needed,
        `on_end(dialogue)` when one ends, `check()` before each step of the engine; what that raises
        ends the rollout outside any forward pass.
        """
        self.seed, self.progress = seed, progress or (lambda count: None)
        self.on_end = on_end or (lambda dialogue: None)
        self.active: dict[Key, Dialogue] = {}
        self.done: dict[Key, Dialogue] = {}
        self.slot_of: dict[Key, int] = {}
        self.key_in: dict[int, Key] = {}
        self.openings: dict[int, str | None] = {}  # group -> first line; None while asked for
        waiting = sorted(jobs, key=lambda job: job.key)
        try:
            while waiting or self.active:
                if check:
                    check()
                waiting = self.admit(waiting)
                # Wait for users only when the engine has nothing to do.
                answers = self.user.poll(0.0 if self.engine.busy else 1.0)
                for key, answer in sorted(answers, key=lambda pair: pair[0]):
                    self.hear(key, answer)
                if self.engine.busy:
                    for row in self.engine.step():
                        self.finish_turn(row)
        finally:
            self.engine.forget()  # the next weights are others
        return [self.done[key] for key in sorted(self.done)]

    def admit(self, waiting: list[Job]) -> list[Job]:
        """Start as many dialogues as there are free slots; returns those that still wait."""
        free = [slot for slot in range(len(self.engine.held)) if slot not in self.key_in]
        left = []
        for job in waiting:
            group, profile = job.key[0], job.profile
            if profile.first_talk is None and self.openings.get(group):
                profile = replace(profile, first_talk=self.openings[group])
            if not free or (profile.first_talk is None and group in self.openings):
                left.append(job)  # has no slot, or waits for the opening that another member gets
                continue
            if profile.first_talk is None:
                self.openings[group] = None
            slot, user_seed = free.pop(0), hash_key(*self.seed, *job.key, USER_STREAM)
            self.active[job.key] = Dialogue(job.key, profile, user_seed)
            self.slot_of[job.key], self.key_in[slot] = slot, job.key
            self.user.start(job.key, profile, user_seed)
        return left

    def hear(self, key: Key, answer: UserTurn | Failed) -> None:
        """Take a user's opening or answer; what an abandoned rollout left over is ignored."""
        dialogue = self.active.get(key)
        if dialogue is None:
            return
        if isinstance(answer, Failed):
            if self.openings.get(key[0], "") is None:
                del self.openings[key[0]]  # the next member of the group makes the opening
            return self.end(dialogue, EXCLUDED, answer.why)
        if not dialogue.turns:
            dialogue.opening = answer
            self.openings[key[0]] = self.openings.get(key[0]) or answer.text
            system = self.talk.systems[dialogue.profile.language]
            return self.say(dialogue, self.chat.opening(system, answer.text))
        last = dialogue.turns[-1]
        last.user = answer
        if answer.ended or len(dialogue.turns) == self.talk.max_turns:
            return self.end(dialogue, answer.ended or "max_turns")
        self.say(dialogue, next_prompt(self.chat, last, answer.text))

    def say(self, dialogue: Dialogue, prompt: list[int]) -> None:
        """Have the policy reply to a prompt, if the context has room for it."""
        if len(prompt) >= self.engine.capacity:
            return self.end(dialogue, "context_full")
        noise = (*self.seed, *dialogue.key, TURN_STREAM, len(dialogue.turns) + 1)
        self.engine.submit(self.slot_of[dialogue.key], prompt, noise, self.talk.reply_tokens)

    def finish_turn(self, row: Row) -> None:
        """The policy has ended its turn: show the reply to the user, or end the dialogue."""
        dialogue = self.active[self.key_in[row.slot]]
        reply = self.chat.read(row.sampled)
        dialogue.turns.append(Turn(row.prompt, row.sampled, row.logps, row.values, reply, row.stop))
        self.progress(1)
        if reply.violation and self.talk.strict_format:
            return self.end(dialogue, "format")
        if len(dialogue.turns) == self.talk.max_turns and not self.talk.appraise_last:
            return self.end(dialogue, "max_turns")
        self.user.tell(dialogue.key, reply.text)

    def end(self, dialogue: Dialogue, reason: str, why: str = "") -> None:
        dialogue.ended, dialogue.why = reason, why
        self.done[dialogue.key] = self.active.pop(dialogue.key)
        del self.key_in[self.slot_of.pop(dialogue.key)]
        self.progress(self.talk.max_turns - len(dialogue.turns))
        self.on_end(dialogue)


@dataclass
class Trajectory:
    """Parallel lists, index t for token t. `logp`, `value` are the sampler's, 0 where mask is 0."""

    key: Key
    tokens: list[int]
    mask: list[int]  # 1 = sampled
    logp: list[float]
    value: list[float]
    begin: int = 0  # trained tokens of the dialogue before this trajectory


def trajectories(dialogue: Dialogue, think: bool) -> list[Trajectory]:
    """The training sequences of a dialogue: one without thoughts, one per turn with them.

    Prompts leave out earlier thoughts, so with thoughts no sequence is the beginning of the next.
    The user's last words are in none: nothing was sampled behind them.
        no think:  prompt S S S glue user header S S     mask 0.. 1 1 1 0 0 0 1 1     one trajectory
        think:     prompt S S S | prompt' S S            mask 0.. 1 1 1 | 0.. 1 1     one per turn
    """
    key, turns = dialogue.key, dialogue.turns
    if think:
        begins = accumulate((len(turn.sampled_ids) for turn in turns), initial=0)
        return [replace(sequence(key, [turn]), begin=begin) for turn, begin in zip(turns, begins)]
    return [sequence(key, turns)] if turns else []


def sequence(key: Key, turns: list[Turn]) -> Trajectory:
    """Turns whose prompts extend each other as one Trajectory; masks come from lengths."""
    tokens, mask, logp, value = [], [], [], []
    for turn in turns:
        if turn.prompt_ids[: len(tokens)] != tokens:
            problem = "a turn's prompt does not extend what was said before"
            raise ValueError(f"dialogue {key}: {problem}")
        new = len(turn.prompt_ids) - len(tokens)
        tokens = [*turn.prompt_ids, *turn.sampled_ids]
        mask += [0] * new + [1] * len(turn.sampled_ids)
        logp += [0.0] * new + turn.logps
        value += [0.0] * new + turn.values
    return Trajectory(key, tokens, mask, logp, value)


@dataclass
class Batch:
    """Trajectories side by side, unpadded: T tokens in order, of which N are trained (mask 1)."""

    tokens_T: Tensor
    position_T: Tensor
    mask_T: Tensor
    trained_N: Tensor  # where mask is 1; of a mask on a GPU, the host would wait for the answer
    predictor_N: Tensor  # where the tokens before those are
    logp_T: Tensor  # the sampler's log-probabilities
    value_T: Tensor  # the sampler's values
    cu_seqlens: list[int]
    attend: PackedAttention
    keys: list[Key]  # dialogue of each trajectory
    begins: list[int]  # trained tokens of that dialogue before each trajectory
    trained: list[int]  # trained tokens of each trajectory

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved, attend=PackedAttention(self.cu_seqlens, device))


def pack(items: list[Trajectory]) -> Batch:
    """Concatenate trajectories; positions restart at 0 in each."""
    ends = [0, *accumulate(len(item.tokens) for item in items)]
    mask_T = torch.tensor([bit for item in items for bit in item.mask], dtype=torch.bool)
    return Batch(
        tokens_T=torch.tensor([token for item in items for token in item.tokens]),
        position_T=torch.cat([torch.arange(len(item.tokens)) for item in items]),
        mask_T=mask_T, trained_N=mask_T.nonzero().squeeze(1), predictor_N=predictors(mask_T),
        logp_T=torch.tensor([logp for item in items for logp in item.logp], dtype=torch.float32),
        value_T=torch.tensor([x for item in items for x in item.value], dtype=torch.float32),
        cu_seqlens=ends, attend=PackedAttention(ends, "cpu"), keys=[item.key for item in items],
        begins=[item.begin for item in items], trained=[sum(item.mask) for item in items],
    )  # fmt: skip


def balance(items: list[Trajectory], ranks: int) -> list[list[Trajectory]]:
    """Share trajectories out over ranks, about as many tokens to each; some ranks may get none.

    The longest first, each to the rank that has least; within a rank they keep their order.
    """
    loads, owner = [0] * ranks, {}
    for index in sorted(range(len(items)), key=lambda i: -len(items[i].tokens)):
        owner[index] = loads.index(min(loads))
        loads[owner[index]] += len(items[index].tokens)
    return [[items[i] for i in sorted(owner) if owner[i] == rank] for rank in range(ranks)]


def split(items: list[Trajectory], micro_tokens: int) -> list[list[Trajectory]]:
    """Micro-batches of up to `micro_tokens` tokens, in order; a longer trajectory goes alone."""
    parts, size = [], 0
    for item in items:
        if not parts or size + len(item.tokens) > micro_tokens:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += len(item.tokens)
    return parts


def log_line(dialogue: Dialogue, **extra) -> dict:
    """A dialogue as a line of SAGE's log; key, status, reasons, thoughts, lengths are our own."""
    profile, opening, history = dialogue.profile, dialogue.opening, []
    if opening:
        history.append({"role": "user", "content": opening.text, "emotion-point": opening.emotion})
    for turn in dialogue.turns:
        said = {"role": "assistant", "content": turn.reply.text, "stop": turn.stop}
        said["tokens"] = len(turn.sampled_ids)
        extras = {"thought": turn.reply.thought, "violation": turn.reply.violation}
        history.append(said | {name: text for name, text in extras.items() if text})
        if turn.user:
            heard = {"role": "user", "content": turn.user.text, "thinking": turn.user.thinking}
            history.append(heard | {"emotion-point": turn.user.emotion})
            if a := turn.user.appraisal:  # one who types what they say gives none
                planning = {"content": a.content, "TargetCompletion": a.target_completion}
                planning |= {"activity": a.activity, "analyse": a.analyse, "change": a.change}
                history[-1]["planning"] = planning | ({"features": a.features} if a.features else {})
    status = {"status": "failed", "why": dialogue.why}
    if dialogue.completed:
        status = {"status": "ok", "emo_point": dialogue.emotion}
        status |= {"emo_state": f"Emotion-{band(dialogue.emotion)}", "reward": dialogue.reward}
    return {
        "id": profile.id, **extra, "key": list(dialogue.key), **status, "ended": dialogue.ended,
        "player": profile.persona, "scene": profile.scene, "character": profile.persona_type,
        "topic": profile.topic, "task": profile.intention, "history": history,
    }  # fmt: skip
