"""`terrazzo generate`: text from a checkpoint or a shipped model, streamed; a chat with Blenderbot."""
import json
import os
import secrets
import sys
import time

import torch
from rich.console import Console

LENGTH = 200  # new tokens, where neither the command nor the checkpoint says how many
SAMPLING = ("temperature", "top_k", "top_p")
SETTINGS = ("max_new_tokens", *SAMPLING, "num_beams", "repetition_penalty")
# Control characters as pictures: what a model says must not command the terminal.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {code: 0xFFFD for code in range(0x7F, 0xA0)}
LEAVE = ("/quit", "/exit")


def add_arguments(parser):
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to go on from (default: standard input)")
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a checkpoint in Hugging Face's layout, or the name of a shipped model, such as tiny-bamba")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"(default: the checkpoint's, or {LENGTH})")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample; below 1 bolder towards the likely; 0: always the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that make up P together")
    parser.add_argument("--seed", type=int, help="of sampling (default: another one every time, told at the end)")
    parser.add_argument("--num-beams", type=int, metavar="N", help="beam search: the text comes at the end, not as a stream")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: what was said becomes less likely")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end behind this text; may be given several times")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as stored; of shipped models float32, in which small ones are faster)")
    parser.add_argument("--chat", action="store_true", help="talk to a Blenderbot, line by line; /quit or the end of input leaves")
    parser.add_argument("--json", action="store_true", help="one object for machines at the end, no stream")


class Speaker:
    """A model with its tokenizer and the settings asked for."""

    def __init__(self, args):
        from .models.auto import SHIPPED, from_pretrained, locate
        from .models.tokenizer import Tokenizer

        folder = locate(args.model)
        self.tokenizer = Tokenizer.of(folder)
        dtype = args.dtype or ("float32" if folder in SHIPPED.values() else None)
        self.model = from_pretrained(folder, dtype and getattr(torch, dtype))
        asked = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
        stored = self.model.generation_config or {}
        if asked.get("num_beams", 1) > 1 and not any(name in asked for name in SAMPLING):
            asked["temperature"] = 0.0  # the checkpoint may sample; beams do not
        elif "num_beams" not in asked and any(name in asked for name in SAMPLING):
            asked["num_beams"] = 1  # the checkpoint may have beams; who samples has none
        if not any(name in asked or stored.get(name) or getattr(self.model.config, name, None) for name in ("max_new_tokens", "max_length")):
            asked["max_new_tokens"] = LENGTH
        self.settings = asked | ({"stop_strings": args.stop, "tokenizer": self.tokenizer} if args.stop else {})
        self.streams = (asked.get("num_beams") or stored.get("num_beams") or 1) == 1
        self.seed = secrets.randbits(32) if args.seed is None else args.seed
        self.generator = torch.Generator(self.model.device).manual_seed(self.seed)

    def say(self, tokens, hear):
        """Generates behind tokens, and calls hear(piece of text) as they come; returns the text, the number of tokens and the seconds."""
        stream, said, count, begin = self.tokenizer.stream(), [], 0, time.perf_counter()

        def on_tokens(new):
            nonlocal count
            count += len(new)
            for token in new.tolist():
                pass_on(stream.feed(token))

        def pass_on(piece):
            if piece:
                said.append(piece)
                hear(piece)

        ids = torch.tensor([tokens], device=self.model.device)
        out = self.model.generate(ids, generator=self.generator, stream=on_tokens if self.streams else None, **self.settings)
        if not self.streams:  # of an encoder-decoder the first token is the begin of the answer
            on_tokens(out[0, 1 if self.model.is_encoder_decoder else len(tokens) :])
        pass_on(stream.end())
        return "".join(said), count, time.perf_counter() - begin


def main(args):
    if args.chat and args.json:
        raise ValueError("terrazzo generate: --chat is for people, --json for machines; leave one out")
    if args.prompt is None and not args.chat and sys.stdin.isatty():
        raise ValueError("terrazzo generate: there is no prompt; name a text, or pipe one in")
    try:
        return _chat(Speaker(args), args.prompt) if args.chat else _once(Speaker(args), args)
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    except BrokenPipeError:  # such as head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _once(speaker, args):
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    chats = speaker.model.is_encoder_decoder
    tokens = speaker.tokenizer.chat([prompt], speaker.model.config.max_position_embeddings) if chats else speaker.tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("terrazzo generate: the prompt is empty, and this tokenizer has no token for the begin of a text")
    if sys.stdout.isatty() and not args.json and not chats:
        Console().print(_seen(prompt), style="dim", end="", markup=False, highlight=False, soft_wrap=True)
    text, count, seconds = speaker.say(tokens, (lambda piece: None) if args.json else _show)
    if args.json:
        print(json.dumps({"model": args.model, "prompt": prompt, "text": text, "prompt_tokens": len(tokens), "new_tokens": count,
                          "seconds": round(seconds, 3), "tokens_per_second": round(count / seconds, 1), "seed": speaker.seed}))  # fmt: skip
        return 0
    print(flush=True)
    _tell(count, seconds, f"; seed {speaker.seed}")
    return 0


def _chat(speaker, first):
    if not speaker.model.is_encoder_decoder:
        raise ValueError(f"terrazzo generate: --chat goes with a Blenderbot, got a {type(speaker.model).__name__}; leave --chat out")
    turns, count, seconds = [], 0, 0.0
    for line in _lines(first):
        answer, new, took = speaker.say(speaker.tokenizer.chat([*turns, line], speaker.model.config.max_position_embeddings), _show)
        print(flush=True)
        turns += [line, answer]
        count, seconds = count + new, seconds + took
    _tell(count, seconds)
    return 0


def _lines(first):
    """What the user says, line by line; `first`, if it is no None, before all else."""
    if first is not None:
        yield first
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if asks else "")
        except EOFError:
            return
        if line.strip() in LEAVE:
            return
        if line.strip():
            yield line.strip()


def _seen(text):
    return text.translate(PICTURES) if sys.stdout.isatty() else text


def _show(piece):
    print(_seen(piece), end="", flush=True)


def _tell(count, seconds, more=""):
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds if seconds else 0:.1f} tokens/s{more}", file=sys.stderr)
