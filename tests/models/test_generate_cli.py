"""terrazzo generate: what it prints, what it passes on, and what it says when it cannot."""
import io
import json
import sys

import pytest
import tokenizers
import torch
from terrazzo import cli
from terrazzo.models import Bamba, BambaConfig, Blenderbot, BlenderbotConfig, Tokenizer, from_pretrained

PROMPT = "The king"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Bamba over bytes whose head prefers letters."""
    torch.manual_seed(0)
    model = Bamba(BambaConfig(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                              attn_layer_indices=[1], mamba_n_heads=8, mamba_d_state=16, pad_token_id=3)).eval()  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.dim() > 1 else None
    path = tmp_path_factory.mktemp("bamba")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("blenderbot")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    inner.train_from_iterator(["hello world, how are you?"] * 3, trainer)
    inner.model.save(str(path))
    model = Blenderbot(BlenderbotConfig(vocab_size=inner.get_vocab_size(), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                                        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=48, decoder_start_token_id=0, pad_token_id=1, bos_token_id=0)).eval()  # fmt: skip
    with torch.no_grad():
        model.model.shared.weight.mul_(20)
    model.generation_config = {"num_beams": 3, "max_length": 12, "min_length": 4}
    model.save_pretrained(path)
    return path


def run(capsys, *argv):
    code = cli.main(["generate", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def expected(folder, prompt=PROMPT, **settings):
    tokenizer, model = Tokenizer.of(folder), from_pretrained(folder)
    tokens = tokenizer.encode(prompt)
    return tokenizer.decode(model.generate(torch.tensor([tokens]), **settings)[0, len(tokens) :].tolist())


def test_the_stream_is_the_models_text(folder, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(sys.stdout, "write", lambda text, write=sys.stdout.write: (written.append(text), write(text)) and len(text))
    code, out, err = run(capsys, "--model", folder, PROMPT, "--max-new-tokens", 40, "--temperature", 0)
    assert code == 0 and out == expected(folder, max_new_tokens=40) + "\n"
    assert len(written) > 20  # piece by piece
    assert "40 tokens in" in err and "tokens/s" in err


def test_the_prompt_comes_from_a_pipe(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run(capsys, "--model", folder, "--max-new-tokens", 9, "--temperature", 0)[1] == expected(folder, max_new_tokens=9) + "\n"


@pytest.mark.parametrize("argv, settings", [
    (("--num-beams", 3), {"num_beams": 3}), (("--repetition-penalty", 1.5, "--temperature", 0), {"repetition_penalty": 1.5}),
    (("--dtype", "bfloat16", "--temperature", 0), {"dtype": torch.bfloat16}), (("--top-k", 1), {}),
], ids=str)  # fmt: skip
def test_settings(folder, argv, settings, capsys):
    dtype = settings.get("dtype")
    tokenizer, model = Tokenizer.of(folder), from_pretrained(folder, dtype)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    wanted = model.generate(ids, 15, **{name: value for name, value in settings.items() if name != "dtype"})[0, ids.shape[1] :].tolist()
    code, out, _ = run(capsys, "--model", folder, PROMPT, "--max-new-tokens", 15, "--json", *argv)
    found = json.loads(out)
    assert code == 0 and found["text"] == tokenizer.decode(wanted)
    assert found["new_tokens"] == 15 and found["prompt"] == PROMPT and found["prompt_tokens"] == ids.shape[1]


def test_the_seed_repeats_what_was_sampled(folder, capsys):
    def sample(*seed):
        return json.loads(run(capsys, "--model", folder, PROMPT, "--max-new-tokens", 30, "--temperature", 1.0, "--json", *seed)[1])

    first = sample()
    assert sample("--seed", first["seed"])["text"] == first["text"] != sample("--seed", first["seed"] + 1)["text"]


def test_it_stops_behind_a_text(folder, capsys):
    whole = expected(folder, max_new_tokens=30)
    stop = next(whole[i : i + 2] for i in range(5, 20) if whole[i : i + 2].isprintable() and whole.index(whole[i : i + 2]) == i)
    out = run(capsys, "--model", folder, PROMPT, "--max-new-tokens", 30, "--temperature", 0, "--stop", "never said", "--stop", stop)[1]
    assert out == whole[: whole.index(stop) + len(stop)] + "\n"


def test_an_answer_with_the_checkpoints_beams(chatty, capsys):
    tokenizer, model = Tokenizer.of(chatty), from_pretrained(chatty)
    answer = tokenizer.decode(model.generate(torch.tensor([tokenizer.chat(["hello you"])]))[0].tolist())
    code, out, err = run(capsys, "--model", chatty, "hello you")
    assert (code, out) == (0, answer + "\n") and "tokens/s" in err


def test_sampling_puts_the_checkpoints_beams_aside(chatty, capsys):
    code, out, _ = run(capsys, "--model", chatty, "hello you", "--temperature", 0.9, "--seed", 1, "--json")
    assert code == 0 and 1 <= json.loads(out)["new_tokens"] <= 11


def test_a_chat_remembers_its_turns(chatty, capsys, monkeypatch):
    tokenizer, model = Tokenizer.of(chatty), from_pretrained(chatty)

    def answer(*turns):
        return tokenizer.decode(model.generate(torch.tensor([tokenizer.chat(list(turns), 48)]))[0].tolist())

    first = answer("hello")
    second = answer("hello", first, "how are you?")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nhow are you?\n/quit\nnever heard\n"))
    code, out, err = run(capsys, "--model", chatty, "--chat")
    assert (code, out) == (0, f"{first}\n{second}\n") and "tokens/s" in err


def test_control_characters_are_shown_on_terminals_only(monkeypatch):
    from terrazzo import generate

    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert generate._seen("\x1b[2J\x9b\n\t") == "\x1b[2J\x9b\n\t"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert generate._seen("\x1b[2J\x9b\n\té") == "␛[2J\ufffd\n\té"


@pytest.mark.parametrize("argv, message", [
    (("--model", "tiny-llama", "x"), "there is no model 'tiny-llama': no such directory, and shipped are tiny-bamba"),
    (("--model", "{bert}", "x"), "must have a model_type of bamba, blenderbot"),
    (("--model", "{folder}", "x", "--chat"), "--chat goes with a Blenderbot, got a Bamba"),
    (("--model", "{folder}", "x", "--chat", "--json"), "leave one out"),
    (("--model", "{folder}", "x", "--top-p", 3), "top_p must be in (0, 1]"),
    (("--model", "{folder}", "x", "--num-beams", 2, "--temperature", 1), "there is no stream and no sampling"),
    (("--model", "{folder}", "x", "--max-new-tokens", -1), "max_new_tokens must be an integer >= 0"),
])  # fmt: skip
def test_errors_are_one_line(folder, argv, message, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 260}')
    code, out, err = run(capsys, *(str(part).format(folder=folder, bert=tmp_path) for part in argv))
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""


def test_a_terminal_without_a_prompt(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, _, err = run(capsys, "--model", folder)
    assert code == 2 and "there is no prompt" in err
