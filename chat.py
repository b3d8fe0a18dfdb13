"""ChatML as token ids: how a dialogue is written for the policy, and how a sampled reply is read.

Text becomes ids once, when it enters, and sampled ids stay: none is decoded and encoded again. So a
dialogue is `opening` + sampled + `glue` + `user_turn` + sampled ..., which `rollout.py` adds up.
"""

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import InputError, require
from model import find_folder

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Reply:
    """A sampled reply, read."""

    ids: list[int]  # those sampled behind the thought, without a final <|im_end|>
    text: str  # what the user sees
    thought: str = ""
    violation: str = ""  # the breach of the think format


@dataclass
class Chat:
    r"""ChatML over one tokenizer. Raises InputError where the tokenizer has no ChatML tokens.

    Example, with the mask in front: system "S", user "hi", sampled Hey<|im_end|>, user "ok" give
        0: <|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n
        1: Hey<|im_end|>
        0: \n<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n
    """

    tokenizer: object
    think: bool = False
    empty_think: bool = False  # whether a no-think reply stands behind an empty think block (Qwen3)

    def __post_init__(self):
        tokens = ("<|im_start|>", "<|im_end|>")
        self.start, self.end = map(self.tokenizer.convert_tokens_to_ids, tokens)
        for token, index in zip(tokens, (self.start, self.end)):
            known = index is not None and index != self.tokenizer.unk_token_id
            # One that is not special could be forged by user text.
            if not known or self.tokenizer.decode([index]) != token or index in self.text(token):
                name, need = self.tokenizer.name_or_path, "a ChatML model is needed (Qwen, SmolLM2)"
                raise InputError(f"{name}: the tokenizer has no special token {token}; {need}")
        self.newline = self.text("\n")
        self.assistant_header = [self.start, *self.text("assistant\n")]
        # Qwen3's own template drops the empty block from past replies; ours keeps it there, since
        # the ids of a dialogue must extend each other.
        empty = self.empty_think and not self.think
        self.empty_block = self.encode_trusted(f"{OPEN}\n\n{CLOSE}\n\n") if empty else []

    def text(self, text: str) -> list[int]:
        """Ids of untrusted text: a literal <|im_end|> in it never becomes the special id."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text of ours, in which think tags may be single ids (Qwen3)."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def message(self, role: str, content: str) -> list[int]:
        """One whole turn. The content is stripped, since its newlines would merge into others."""
        return [self.start, *self.text(f"{role}\n{content.strip()}"), self.end, *self.newline]

    def opening(self, system: str, user: str) -> list[int]:
        """Ids up to the first reply; an empty system prompt writes no system turn."""
        system_ids = self.message("system", system) if system.strip() else []
        return [*system_ids, *self.user_turn(user)]

    def glue(self, ids: list[int]) -> list[int]:
        """What closes a sampled turn: a newline; <|im_end|> too where the turn hit its cap."""
        return self.newline if ids and ids[-1] == self.end else [self.end, *self.newline]

    def user_turn(self, content: str) -> list[int]:
        """Ids of a later user turn and the assistant header behind it."""
        return [*self.message("user", content), *self.assistant_header, *self.empty_block]

    def read(self, ids: list[int]) -> Reply:
        """Read what was sampled in one turn: in think mode `<think>...</think>`, then a reply.

        The whole id that completes `</think>` belongs to the thought. Tokenizers merge `>` with
        what follows, and text there could not be kept out of the thought: it is a violation.
        """
        body = ids[:-1] if ids and ids[-1] == self.end else ids
        if not self.think:
            return Reply(body, self.decode(body).strip())
        whole = self.decode(body)
        if CLOSE not in whole:
            return Reply([], "", whole, "thought not closed" if OPEN in whole else "no thought")
        # Bisection: a prefix that holds </think> holds it when it grows.
        cut = bisect_left(range(len(body)), True, 1, key=lambda n: CLOSE in self.decode(body[:n]))
        thought, reply = self.decode(body[:cut]), self.decode(body[cut:]).strip()
        violation = "" if reply else "no reply behind the thought"
        if not whole.lstrip().startswith(OPEN):
            violation = "no <think> at the start"
        elif thought[thought.index(CLOSE) + len(CLOSE) :].strip():
            violation = "text in the token that closes the thought"
        elif whole.count(OPEN) != 1 or whole.count(CLOSE) != 1:
            violation = "more than one think tag"
        return Reply(body[cut:], reply, thought, violation)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, nothing cleaned up and no special token hidden."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class Stream:
    """The text of one reply while it is sampled, and where a stop string cuts it."""

    def __init__(self, chat: Chat, stops: tuple[str, ...] = ()):
        self.chat, self.stops, self.thought, self.text, self.stopped = chat, stops, "", "", False

    def more(self, ids: list[int], ended: bool) -> tuple[str, str]:
        """What thought and text have got since the last call, given all ids so far.

        Held back unless `ended`: half a character, white space, and what may begin a stop string.
        Put together the text is `Chat.read(ids).text`, or that up to the first stop string.
        """
        whole = self.chat.decode(ids[:-1] if ids and ids[-1] == self.chat.end else ids)
        thought, close, text = whole.partition(CLOSE) if self.chat.think else ("", "", whole)
        found = [at for at in map(text.find, self.stops) if at >= 0]
        self.stopped = bool(found)
        text = text[: min(found)] if found else text
        if not ended and not found:
            text, thought = text.rstrip("\ufffd"), thought if close else thought.rstrip("\ufffd")
            begun = [n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])]
            text = text[: len(text) - max(begun, default=0)]
        before, self.thought, self.text = (self.thought, self.text), thought + close, text.strip()
        return self.thought[len(before[0]) :], self.text[len(before[1]) :]


def load_tokenizer(name: str):
    """A transformers tokenizer from a folder or the hub, or `bytes`. Raises InputError for none."""
    import transformers

    if name == "bytes":
        return byte_tokenizer(transformers)
    give = "give tokenizer=bytes, or a folder or hub name"
    require(not name.endswith(".json"), f"{name}: a shape file has no tokenizer; {give}")
    folder = find_folder(name, weights=False)
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"{name}: no tokenizer could be read there ({line})") from None


def byte_tokenizer(transformers):
    """One id per byte and the ChatML specials, 259 ids: random models then need no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"])  # fmt: skip


def make_chat(tokenizer, think: bool) -> Chat:
    """The Chat for a tokenizer, with Qwen3's empty think block if its own template has one."""
    return Chat(tokenizer, think, empty_think="enable_thinking" in (tokenizer.chat_template or ""))


def system_prompt(language: str, think: bool, override: str = "") -> str:
    """The policy's system prompt: the file given, else prompts/policy_{en,zh}{,_think}.txt."""
    ours = Path(__file__).parent / "prompts" / f"policy_{language}{'_think' if think else ''}.txt"
    path = Path(override) if override else ours
    require(path.is_file(), f"{path}: no such prompt file; give system=FILE or restore prompts/")
    return path.read_text(encoding="utf-8").strip()


def banned_ids(tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> Tensor:
    """Boolean [V]: ids beyond the tokenizer, and special ids (they forge turns) but `stop_ids`."""
    banned = torch.arange(vocab_size) >= len(tokenizer)
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    banned[[i for i in special if i < vocab_size and i not in stop_ids]] = True
    return banned
