"""Text to tokens and back: the files of a checkpoint through the `tokenizers` library, or bytes.

    tokenizer.json               what the library stores, with the special tokens that it puts around a text
    vocab.json, merges.txt       Blenderbot's byte-level BPE: words with the space before them, </s> behind a text
    neither                      bytes, if the checkpoint is a BLT's or its vocabulary has 260 tokens: 4 + byte, BOS 1, EOS 2
"""
import codecs
from pathlib import Path

from .entropy_model import BOS, OFFSET
from .loading import CONFIG, read_json

FN = "terrazzo.models.Tokenizer"
EOS, BYTES = 2, OFFSET + 256
BETWEEN_TURNS = "  "  # what Blenderbot was trained with; the user's turns begin with a space of their own
SPECIAL = ("bos", "eos", "pad", "unk")


class Tokenizer:
    """encode, decode, stream; `bos`, `eos`, `pad` and `unk` are ids or None. Tokenizer.of(directory) makes the one of a checkpoint."""

    bos = eos = pad = unk = None

    @staticmethod
    def of(path):
        """The tokenizer of the checkpoint in a directory.

        Raises: FileNotFoundError, ValueError: no files of a tokenizer, or spoilt ones. ImportError: `tokenizers` is not installed.
        """
        folder = Path(path)
        config = read_json(FN, folder / CONFIG)
        if str(config.get("model_type", "")).startswith("blt"):
            return ByteTokenizer(config.get("pad_token_id"))
        if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return FileTokenizer(folder, config)
        if config.get("vocab_size") == BYTES:
            return ByteTokenizer(config.get("pad_token_id"))
        raise FileNotFoundError(f"{FN}: {folder} has no tokenizer.json, no vocab.json with merges.txt, and its vocab_size {config.get('vocab_size')} is not "
                                f"that of bytes, {BYTES}; put the checkpoint's tokenizer files beside {CONFIG}")  # fmt: skip

    def encode(self, text, special=True):
        """[token, ...] of a str; special: with the tokens that the model expects around a text."""
        raise NotImplementedError

    def decode(self, tokens):
        """The str of tokens, without special ones; what is no UTF-8 becomes U+FFFD."""
        raise NotImplementedError

    def stream(self):
        """An object with feed(token) and end() -> str: what each token completes, never half a character, and what is left at the end."""
        raise NotImplementedError

    def chat(self, turns, longest=None):
        """The tokens of a chat for Blenderbot. turns: [str, ...], the user's first and last, the answers between them as they were decoded.

        Texts of more than `longest` tokens lose their oldest turns, and if the last alone is too long, its begin.
        """
        if not turns or len(turns) % 2 == 0:
            raise ValueError(f"{FN}.chat: turns must be the user's and the answers by turns, the user's first and last, got {len(turns)}")
        said = [turn if i % 2 else " " + turn for i, turn in enumerate(turns)]
        while len(tokens := self.encode(BETWEEN_TURNS.join(said))) > (longest or len(tokens)) and len(said) > 1:
            said.pop(0)
        return tokens[-longest:] if longest else tokens


class ByteTokenizer(Tokenizer):
    """Token 4 + byte, behind BOS."""

    bos, eos = BOS, EOS

    def __init__(self, pad=None):
        self.pad = pad

    def encode(self, text, special=True):
        return [self.bos] * special + [OFFSET + byte for byte in text.encode("utf-8", "surrogateescape")]

    def decode(self, tokens):
        return _bytes(tokens).decode("utf-8", "replace")

    def stream(self):
        return ByteStream()


def _bytes(tokens):
    return bytes(token - OFFSET for token in tokens if OFFSET <= token < BYTES)


class ByteStream:
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token):
        return self._decoder.decode(_bytes([token]))

    def end(self):
        return self._decoder.decode(b"", final=True)


class FileTokenizer(Tokenizer):
    def __init__(self, folder, config):
        library = _library()
        stored = _stored(folder)
        names = {kind: stored[f"{kind}_token"] for kind in SPECIAL if isinstance(stored.get(f"{kind}_token"), str)}
        try:
            if (folder / "tokenizer.json").exists():
                self._inner = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
            else:
                self._inner = _byte_level(library, folder, names)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{FN}: the tokenizer files in {folder} are spoilt: {error}") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        for kind in SPECIAL:
            named = self._inner.token_to_id(names[kind]) if kind in names else None
            setattr(self, kind, named if named is not None else config.get(f"{kind}_token_id"))

    def encode(self, text, special=True):
        return self._inner.encode(text, add_special_tokens=special).ids

    def decode(self, tokens):
        return self._inner.decode(list(tokens), skip_special_tokens=True)

    def stream(self):
        return FileStream(self)


class FileStream:
    def __init__(self, tokenizer):
        self._tokenizer, self._tokens, self._said = tokenizer, [], 0
        self._pieces = _library().decoders.DecodeStream(skip_special_tokens=True)

    def feed(self, token):
        self._tokens.append(token)
        piece = self._pieces.step(self._tokenizer._inner, token) or ""
        self._said += len(piece)
        return piece

    def end(self):
        return self._tokenizer.decode(self._tokens)[self._said :]


def _library():
    try:
        import tokenizers
    except ImportError:
        raise ImportError(f"{FN}: this checkpoint's tokenizer needs the package tokenizers; pip install terrazzo[hf]") from None
    return tokenizers


def _stored(folder):
    """What tokenizer_config.json, and before it the older special_tokens_map.json, say; tokens as str."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        found |= read_json(FN, folder / file) if (folder / file).exists() else {}
    return {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}


def _byte_level(library, folder, names):
    """Blenderbot's tokenizer from vocab.json and merges.txt."""
    model = library.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token=names.get("unk", "<unk>"))
    inner = library.Tokenizer(model)
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = library.decoders.ByteLevel()
    special = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"} | names
    inner.add_special_tokens([name for name in special.values() if inner.token_to_id(name) is not None])
    end = inner.token_to_id(special["eos"])
    if end is None:
        raise ValueError(f"vocab.json has no {special['eos']}")
    inner.post_processor = library.processors.TemplateProcessing(single=f"$A {special['eos']}", special_tokens=[(special["eos"], end)])
    return inner
