"""Text from a model: greedy, sampling and beam search. Of the same weights greedy and beam search give transformers' tokens.

A model offers
    begin(input_ids, valid) -> (ids, state): what generation starts from, and the state to carry;
    advance(ids, state) -> (B, V): logits behind the last of the new ids, the state brought up to date;
    state.reorder(rows): row i goes on from what row rows[i] was.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from .layers import check_ids, check_valid

NEVER = -1.0e9  # a score that no beam comes back from


@dataclass
class Settings:
    """How to generate. The names are transformers'; None, or the default, switches a rule off."""

    max_new_tokens: int | None = None
    max_length: int | None = None            # prompt included; max_new_tokens goes before it
    min_new_tokens: int | None = None
    min_length: int = 0                      # prompt included
    temperature: float | None = None         # sampling, with this or with one of the next two; 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0    # n-grams of the question that the answer must not hold
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False       # True, False or "never"
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    forced_eos_token_id: int | list | None = None  # the token at max_length
    stop_strings: list | str | None = None   # needs the tokenizer

    @classmethod
    def of(cls, fn, asked, stored, config):
        """What the caller asks for, over what the checkpoint's generation_config.json says; where there is none, what its config says."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(asked) - known)
        if unknown:
            raise TypeError(f"{fn}: unknown setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
        asked = {name: value for name, value in asked.items() if value is not None}
        defaults = {name: value for name in known if (value := stored.get(name) if stored else getattr(config, name, None)) is not None}
        if not stored.get("do_sample"):
            defaults = {name: value for name, value in defaults.items() if name not in ("temperature", "top_k", "top_p")}
        if "max_new_tokens" in asked:
            defaults.pop("max_length", None)
        if "max_length" in asked:
            defaults.pop("max_new_tokens", None)
        settings = cls(**defaults | asked)
        settings.check(fn)
        return settings

    def check(self, fn):
        def need(ok, name, rule):
            if not ok:
                raise ValueError(f"{fn}: {name} must be {rule}, got {getattr(self, name)!r}")

        def whole(value, low):
            return isinstance(value, int) and not isinstance(value, bool) and value >= low

        for name in ("max_new_tokens", "max_length", "min_new_tokens"):
            need(getattr(self, name) is None or whole(getattr(self, name), 0), name, "an integer >= 0")
        for name in ("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            need(whole(getattr(self, name), 0), name, "an integer >= 0")
        need(whole(self.num_beams, 1), "num_beams", "a positive integer")
        need(self.temperature is None or self.temperature >= 0, "temperature", ">= 0")
        need(self.top_k is None or whole(self.top_k, 0), "top_k", "an integer >= 0 (0: all tokens)")
        need(self.top_p is None or 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(self.repetition_penalty > 0, "repetition_penalty", "> 0")
        need(self.early_stopping in (True, False, "never"), "early_stopping", "True, False or 'never'")

    @property
    def samples(self):
        return self.temperature != 0 and any(value is not None for value in (self.temperature, self.top_k, self.top_p))

    @property
    def eos(self):
        return _ids(self.eos_token_id)

    def length(self, fn, prompt):
        if self.max_new_tokens is not None:
            return prompt + self.max_new_tokens
        if self.max_length is None:
            raise ValueError(f"{fn}: say how long: max_new_tokens, or max_length with the prompt's {prompt} tokens included")
        return max(self.max_length, prompt)


def _ids(token):
    return [] if token is None else list(token) if isinstance(token, (list, tuple)) else [token]


class Generation:
    """generate() for a model."""

    generation_config = None

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens=None, *, attention_mask=None, stream=None, tokenizer=None, generator=None, **settings):
        """Goes on from input_ids.

        Args:
            input_ids: (B, L) tokens; texts of unequal length are padded on the left (Blenderbot's questions on the right).
            max_new_tokens: how many at most.
            attention_mask: (B, L), zero on padding; None: there is none.
            stream: called with the (B,) tokens of every step; not with beams.
            tokenizer: decodes for stop_strings: an object with decode(list of tokens) -> str.
            generator: torch.Generator for sampling.
            settings: temperature, top_k, top_p, num_beams, ...: the fields of `Settings`. Those left out are the checkpoint's.

        Returns:
            (B, L + new) tokens; a row that ended is padded. Encoder-decoder models return the answer alone.
        """
        fn = f"terrazzo.{type(self).__name__}.generate"
        settings = Settings.of(fn, settings | {"max_new_tokens": max_new_tokens}, self.generation_config or {}, self.config)
        if stream is not None and not callable(stream):
            raise TypeError(f"{fn}: stream must be a function of the new tokens, got {stream!r}")
        if settings.stop_strings and tokenizer is None:
            raise ValueError(f"{fn}: stop_strings needs the tokenizer that decodes")
        if settings.num_beams > 1 and (stream is not None or settings.samples):
            raise ValueError(f"{fn}: with num_beams {settings.num_beams} there is no stream and no sampling; give num_beams=1")
        valid = self.prompt_mask(fn, input_ids, attention_mask)
        ids, state = self.begin(input_ids, valid)
        rules = Rules(settings, ids.shape[1], settings.length(fn, ids.shape[1]), input_ids, self.is_encoder_decoder)
        stops = Stops(settings, ids.shape[1], rules.length, tokenizer)
        if ids.shape[1] >= rules.length or not len(ids):
            return ids
        if settings.num_beams > 1:
            return _beam_search(self, ids, state, settings, rules, stops)
        return _search(self, ids, state, settings, rules, stops, stream, generator)


    def prompt_mask(self, fn, input_ids, attention_mask):
        """attention_mask (B, L) of a prompt as bool, or None; padding must stand on the left, where no token follows it."""
        check_ids(fn, "input_ids", input_ids, self.config.vocab_size)
        valid = check_valid(fn, attention_mask, *input_ids.shape)
        if input_ids.shape[1] == 0:
            raise ValueError(f"{fn}: input_ids must hold a token at least, got {tuple(input_ids.shape)}")
        if valid is not None and not self.is_encoder_decoder and not bool(valid[:, -1].all()):
            raise ValueError(f"{fn}: attention_mask must be 1 at the end of every row; pad on the left")
        return valid


class CausalGeneration(Generation):
    """For models of one stack: new_state() -> State, and forward with attention_mask, state and logits_to_keep."""

    is_encoder_decoder = False

    def begin(self, input_ids, valid):
        state = self.new_state()
        state.valid = valid
        return input_ids, state

    def advance(self, ids, state):
        if state.valid is not None and state.length:
            state.valid = F.pad(state.valid, (0, ids.shape[1]), value=True)
        return self(ids, attention_mask=state.valid, state=state, logits_to_keep=1).logits[:, -1]


class Rules:
    """What is done to scores (rows, V) of the token behind ids (rows, n), in transformers' order."""

    def __init__(self, settings, prompt, length, question, is_encoder_decoder):
        self.settings, self.length = settings, length
        self.shortest = max(settings.min_length, prompt + (settings.min_new_tokens or 0))
        size = settings.encoder_no_repeat_ngram_size
        self.question = question if size and is_encoder_decoder else None

    def __call__(self, ids, scores):
        s, n = self.settings, ids.shape[1]
        if s.repetition_penalty != 1:
            seen = scores.gather(1, ids)
            scores = scores.scatter(1, ids, torch.where(seen < 0, seen * s.repetition_penalty, seen / s.repetition_penalty))
        if s.no_repeat_ngram_size:
            scores = _ban(scores, ids, ids, s.no_repeat_ngram_size)
        if self.question is not None:
            question = self.question.repeat_interleave(len(ids) // len(self.question), 0)
            scores = _ban(scores, ids, question, s.encoder_no_repeat_ngram_size)
        if n < self.shortest and s.eos:
            scores = scores.index_fill(1, torch.tensor(s.eos, device=scores.device), -math.inf)
        if n == self.length - 1 and s.forced_eos_token_id is not None:
            scores = torch.full_like(scores, -math.inf).index_fill(1, torch.tensor(_ids(s.forced_eos_token_id), device=scores.device), 0.0)
        return scores


def _ban(scores, ids, text, size):
    """Scores without the tokens that would make one more n-gram of `text` (rows, m) at the end of ids (rows, n)."""
    if ids.shape[1] + 1 < size or text.shape[1] < size:
        return scores
    grams = text.unfold(1, size, 1)  # (rows, m - size + 1, size)
    begun = (grams[..., :-1] == ids[:, ids.shape[1] + 1 - size :].unsqueeze(1)).all(-1)
    banned = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    banned.scatter_(1, torch.where(begun, grams[..., -1], scores.shape[1]), True)
    return scores.masked_fill(banned[:, :-1], -math.inf)


class Stops:
    """Which rows of ids (rows, n) end with their last token."""

    def __init__(self, settings, prompt, length, tokenizer):
        self.eos, self.prompt, self.length, self.tokenizer = settings.eos, prompt, length, tokenizer
        self.strings = [settings.stop_strings] if isinstance(settings.stop_strings, str) else list(settings.stop_strings or ())
        self.tail = max((len(s.encode()) for s in self.strings), default=0) + 8  # tokens; one holds a byte at least

    def __call__(self, ids):
        ends = torch.full((len(ids),), ids.shape[1] >= self.length, device=ids.device)
        if self.eos:
            ends |= torch.isin(ids[:, -1], torch.tensor(self.eos, device=ids.device))
        for row, tokens in enumerate(ids[:, max(self.prompt, ids.shape[1] - self.tail) :].tolist() if self.strings else ()):
            text = self.tokenizer.decode(tokens)
            ends[row] |= any(string in text for string in self.strings)
        return ends


def _choose(scores, settings, generator):
    """(rows,) tokens: the likeliest, or drawn from what temperature, top_k and top_p leave."""
    if not settings.samples:
        return scores.argmax(-1)
    if settings.temperature is not None:
        scores = scores / settings.temperature
    if settings.top_k:
        least = scores.topk(min(settings.top_k, scores.shape[1]))[0][:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if settings.top_p is not None and settings.top_p < 1:
        ascending, order = scores.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        drop[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _search(model, ids, state, settings, rules, stops, stream, generator):
    pad = settings.pad_token_id if settings.pad_token_id is not None else (settings.eos or [0])[0]
    new, ended = ids, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while True:
        tokens = _choose(rules(ids, model.advance(new, state).float()), settings, generator).masked_fill(ended, pad)
        new = tokens[:, None]
        ids = torch.cat([ids, new], 1)
        if stream is not None:
            stream(tokens)
        ended = ended | stops(ids)
        if bool(ended.all()):
            return ids


def _beam_search(model, ids, state, settings, rules, stops):
    """The `beams` best continuations of each row are followed; of those that ended the best by log-probability / length ** penalty wins."""
    rows, prompt = ids.shape
    beams, eos = settings.num_beams, settings.eos
    kept = max(2, 1 + len(eos)) * beams  # enough that `beams` are left when the others end
    filler = settings.pad_token_id or (eos[0] if eos else -1)
    device = ids.device

    def pick(values, index):  # (rows, m, ...) by (rows, k)
        return values.gather(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:]))

    running = torch.full((rows, beams, rules.length), filler, device=device)
    running[:, :, :prompt] = ids[:, None]
    done, done_ended = running.clone(), torch.zeros(rows, beams, dtype=torch.bool, device=device)
    done_lengths = torch.full((rows, beams), prompt, device=device)
    scores = torch.full((rows, beams), NEVER, device=device).index_fill(1, torch.tensor([0], device=device), 0.0)
    done_scores = torch.full((rows, beams), NEVER, device=device)
    improving = torch.ones(rows, 1, dtype=torch.bool, device=device)
    logits = model.advance(ids, state).repeat_interleave(beams, 0)  # the prompt once for all beams
    state.reorder(torch.arange(rows, device=device).repeat_interleave(beams))

    for length in range(prompt, rules.length):
        flat = running[:, :, :length].flatten(0, 1)
        values = rules(flat, F.log_softmax(logits.float(), -1)).view(rows, beams, -1) + scores[:, :, None]
        vocab = values.shape[2]
        best, index = values.flatten(1).topk(kept)
        source, tokens = index // vocab, index % vocab
        longer = pick(running, source)
        longer[:, :, length] = tokens
        ends = stops(longer[:, :, : length + 1].flatten(0, 1)).view(rows, kept)

        # the beams to follow
        following = best + ends * NEVER
        chosen = following.topk(beams)[1]
        running, scores = pick(longer, chosen), pick(following, chosen)
        parents = pick(source, chosen)

        # those that ended, if they were among the best, against those that had ended before
        finished = ends & (torch.arange(kept, device=device) < beams)
        full = done_ended.all(1, keepdim=True) & (settings.early_stopping is True)
        final = best / (length + 1 - prompt) ** settings.length_penalty
        final = final + full * NEVER + ~improving * NEVER + ~finished * NEVER
        all_scores = torch.cat([done_scores, final], 1)
        winners = all_scores.topk(beams)[1]
        done_scores, done = pick(all_scores, winners), pick(torch.cat([done, longer], 1), winners)
        done_ended = pick(torch.cat([done_ended, finished], 1), winners)
        done_lengths = pick(torch.cat([done_lengths, torch.full_like(source, length + 1)], 1), winners)

        # whether a beam may still come out better than the worst that ended
        reach = (rules.length if settings.early_stopping == "never" and settings.length_penalty > 0 else length + 1) - prompt
        worst = torch.where(done_ended, done_scores.min(1, keepdim=True)[0], NEVER)
        improving = improving & (scores[:, :1] / reach**settings.length_penalty > worst).any(1, keepdim=True)
        open_rows = not (settings.early_stopping is True and bool(done_ended.all()))
        if not (bool(improving.any()) and open_rows and not bool(ends.all())):
            break
        state.reorder((parents + beams * torch.arange(rows, device=device)[:, None]).flatten())
        logits = model.advance(running[:, :, length].reshape(-1, 1), state)
    return done[:, 0, : int(done_lengths[:, 0].max())]
