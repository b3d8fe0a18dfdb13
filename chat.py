"""ChatML as token ids: how a dialogue is written for the policy, and how a sampled reply is read.

The one rule (DESIGN: ids once): text becomes ids when it enters, sampled ids are kept as they are, and nothing is ever
decoded and encoded again. So a dialogue's ids are `opening` + sampled + `glue` + `user_turn` + sampled + ... Here live
the pieces of that sum; `rollout.py` adds them up. transformers' tokenizer does the text-to-ids work only.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from config import InputError
from model import find_folder

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Reply:
    """A sampled reply, read. `ids` are the sampled ids behind the thought, a final <|im_end|> excluded (views into what
    was sampled, for the next prompt); `text` is what the user sees; `violation` names a breach of the think format."""

    ids: list[int]
    text: str
    thought: str = ""
    violation: str = ""


@dataclass
class Chat:
    """ChatML over one tokenizer. Raises InputError where the tokenizer has no ChatML tokens.

    Example (no think): system "S", user "hi", sampled [Hey, <|im_end|>], user "ok" gives
        mask 0:  <|im_start|>system\\n S <|im_end|>\\n <|im_start|>user\\n hi <|im_end|>\\n <|im_start|>assistant\\n
        mask 1:  Hey <|im_end|>                                                                  (what was sampled)
        mask 0:  \\n <|im_start|>user\\n ok <|im_end|>\\n <|im_start|>assistant\\n
    """

    tokenizer: object
    think: bool = False
    empty_think: bool = field(default=False)  # Qwen3's template writes an empty think block before a no-think reply

    def __post_init__(self):
        special = {token: self.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
        for token, index in special.items():
            known = index is not None and index != self.tokenizer.unk_token_id
            # One that is not special could be forged by user text.
            if not known or self.tokenizer.decode([index]) != token or index in self.text(token):
                where = self.tokenizer.name_or_path
                raise InputError(
                    f"{where}: the tokenizer has no special token {token}; a ChatML model is needed (Qwen, SmolLM2)"
                )
        self.start, self.end = special["<|im_start|>"], special["<|im_end|>"]
        self.newline = self.text("\n")
        self.assistant_header = [self.start, *self.text("assistant\n")]
        self.empty_block = self.encode_trusted(f"{OPEN}\n\n{CLOSE}\n\n") if self.empty_think and not self.think else []

    def text(self, text: str) -> list[int]:
        """Ids of untrusted text: a literal <|im_end|> in it stays text, special ids never come out."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text of ours, in which think tags may be single ids (Qwen3)."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def message(self, role: str, content: str) -> list[int]:
        """<|im_start|>role\\n content <|im_end|>\\n; the content is stripped, its newlines would merge into others."""
        return [self.start, *self.text(f"{role}\n{content.strip()}"), self.end, *self.newline]

    def opening(self, system: str, user: str) -> list[int]:
        """Ids of the first prompt, to the end of the assistant header. An empty system prompt writes no system turn."""
        system_ids = self.message("system", system) if system.strip() else []
        return [*system_ids, *self.message("user", user), *self.assistant_header, *self.empty_block]

    def glue(self, ids: list[int]) -> list[int]:
        """What closes a sampled turn: the newline behind <|im_end|>; both where the turn hit its cap."""
        return self.newline if ids and ids[-1] == self.end else [self.end, *self.newline]

    def user_turn(self, content: str) -> list[int]:
        """Ids of a later user turn and the assistant header behind it."""
        return [*self.message("user", content), *self.assistant_header, *self.empty_block]

    def read(self, ids: list[int]) -> Reply:
        """Read what was sampled in one turn. In think mode the reply is `<think>...</think>` and text behind it.

        The id that completes `</think>` belongs to the thought (tokenizers merge `>` with what follows); other text
        than white space behind the `>` in that same id cannot be kept out of the thought and is a violation, as are a
        missing or second tag and an empty reply. Without `</think>` nothing is shown.
        """
        body = ids[:-1] if ids and ids[-1] == self.end else ids
        if not self.think:
            return Reply(body, self.decode(body).strip())
        whole, cut = self.decode(body), self.close_index(body)
        if not cut:
            return Reply([], "", whole, "thought not closed" if OPEN in whole else "no thought")
        thought, reply = self.decode(body[:cut]), self.decode(body[cut:]).strip()
        if not whole.lstrip().startswith(OPEN):
            violation = "no <think> at the start"
        elif thought[thought.index(CLOSE) + len(CLOSE) :].strip():
            violation = "text in the token that closes the thought"
        elif whole.count(OPEN) != 1 or whole.count(CLOSE) != 1:
            violation = "more than one think tag"
        else:
            violation = "" if reply else "no reply behind the thought"
        return Reply(body[cut:], reply, thought, violation)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, nothing cleaned up and no special token hidden."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def close_index(self, ids: list[int]) -> int:
        """How many ids the thought takes, the one that completes the first </think> included; 0 if there is none.

        Bisection on the decoded prefix: "contains </think>" is monotone in the number of ids.
        """
        if CLOSE not in self.decode(ids):
            return 0
        low, high = 0, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if CLOSE in self.decode(ids[:middle]) else (middle, high)
        return high


def load_tokenizer(name: str):
    """A transformers tokenizer from a local folder or the hub, or `bytes`. Raises InputError where there is none."""
    import transformers

    if name == "bytes":
        return byte_tokenizer(transformers)
    if name.endswith(".json"):
        raise InputError(f"{name}: a shape file has no tokenizer; give tokenizer=bytes, or a folder or hub name")
    folder = find_folder(name, weights=False)
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"{name}: no tokenizer could be read there ({line})") from None


def byte_tokenizer(transformers):
    """One id per byte and the ChatML specials, 259 ids: for tiny random models, where no download is wanted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def make_chat(tokenizer, think: bool) -> Chat:
    """The Chat for a tokenizer; whether no-think replies get Qwen3's empty block is read off its own template."""
    template = tokenizer.chat_template or ""
    return Chat(tokenizer, think, empty_think="enable_thinking" in template)


def system_prompt(language: str, think: bool, override: str = "") -> str:
    """The policy's system prompt: the file given, else prompts/policy_{en,zh}{,_think}.txt."""
    ours = Path(__file__).parent / "prompts" / f"policy_{language}{'_think' if think else ''}.txt"
    path = Path(override) if override else ours
    if not path.is_file():
        raise InputError(f"{path}: no such prompt file; give system=FILE or restore prompts/")
    return path.read_text(encoding="utf-8").strip()


def banned_ids(tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> Tensor:
    """Boolean [V]: ids beyond the tokenizer, and special ids but the stop ids: <|im_start|> would forge a turn."""
    banned = torch.zeros(vocab_size, dtype=torch.bool)
    banned[len(tokenizer) :] = True
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    banned[[i for i in special if i < vocab_size and i not in stop_ids]] = True
    return banned
