"""run.py as its users meet it: in a pipe, with wrong input, in odd surroundings.

python -m pytest tests/cli/test_run.py
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import COMPLETE, PROMPT, ROOT, RUN, TINY, Result, command, in_process, text_of
from small_models import TINY_QWEN3, export_small_model, write_small_model

from qwen3c import MODEL_IN_THE_BOX, Model, engine
from qwen3c.cli import modes as run_modes
from qwen3c.cli.options import MODES
from qwen3c.format import ModelFile, ModelFileError, ModelWriter
from qwen3c.system.machine import THREAD_VARIABLES, default_threads, n_cpus

pytestmark = pytest.mark.usefixtures("default_model")

# ----------------------------------------------------------------------------
# generate


def test_stdout_carries_the_text_of_the_model_alone(model: Model) -> None:
    expected = text_of(model, model.tokenizer.encode(PROMPT), 30, seed=7)
    done = command(*COMPLETE, "-i", PROMPT, "-n", "30", "-s", "7")
    assert done.status == 0 and done.out == expected.rstrip("\n") + "\n"
    chosen, speed = done.err.splitlines()
    why = "QWEN3C_THREADS" if engine.OPENMP else "built without OpenMP"
    assert re.search(
        r"int8 g64 .* \| raw text \| temperature 0\.6 top-p 0\.95 top-k 20 \| context 2048 of 2048 "
        rf"\(KV f16: 6\.0 MiB when full\) \| threads 1 \({why}\) \| \w+ \(",
        chosen,
    )
    assert re.fullmatch(
        r"prompt 8 tok [\d.]+ tok/s \| reply 30 tok [\d.]+ tok/s( \([\d.]+ tokens a pass\))? "
        r"\| context 37/2048 \| seed 7 \| cut at max tokens \(-n\)",
        speed,
    )


def test_drafts_change_the_speed_line_alone(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [TINY, *COMPLETE, "-i", "red, green, blue, " * 9, "-n", "60", "-t", "0"]
    plain = in_process(capsys, *asked, "--no-draft")
    assert plain.status == 0 and "tokens a pass" not in plain.err
    for options in ([], ["--draft", TINY]):
        done = in_process(capsys, *asked, *options)
        assert done.out == plain.out and re.search(r" \([\d.]+ tokens a pass\) \| ", done.err)
    both = in_process(capsys, *asked, "--draft", TINY, "--no-draft")
    assert both.status == 2 and "not allowed with argument" in both.err


def test_a_draft_model_of_another_vocabulary_is_one_line(
    small: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for path, complaint in (
        (small, f"{small}: it cannot draft for {TINY}, which has another tokenizer"),
        (str(tmp_path / "none.bin"), "none.bin: No such file or directory"),
    ):
        for mode in ("generate", "serve"):
            text = ["-i", "x"] if mode == "generate" else []
            done = in_process(capsys, TINY, "-m", mode, "--draft", path, *text)
            assert done.status == 2 and done.out == ""
            assert complaint in done.err and done.err.count("\n") == 1, done.err


def test_the_model_is_the_one_named_else_that_of_the_environment_else_the_one_in_the_box(
    small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def path_of(*args: str) -> str:
        return json.loads(in_process(capsys, *args, "-m", "info", "--json").out)["path"]

    assert path_of() == TINY and path_of(small) == small
    for unset in (None, ""):
        monkeypatch.setenv("QWEN3C_MODEL", unset) if unset is not None else monkeypatch.delenv("QWEN3C_MODEL")
        assert path_of() == str(MODEL_IN_THE_BOX)
    monkeypatch.setenv("QWEN3C_MODEL", "/missing.bin")
    done = in_process(capsys)
    assert done.status == 2 and "which model? There is none at /missing.bin" in done.err


def test_the_prompt_comes_from_where_it_is_said(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("import os\n")
    options = ["-n", "8", "-t", "0"]

    def given(*args: str, stdin: bytes = b"") -> str:
        return command(*COMPLETE, *args, *options, input=stdin).out

    def expected(prompt: str) -> str:
        return text_of(model, model.tokenizer.encode(prompt), 8, temperature=0).rstrip("\n") + "\n"

    # one newline at the end of a file is the editor's, not the prompt's
    assert given(stdin=b"import os\n") == given("-i", "-", stdin=b"import os") == expected("import os")
    assert given("--file", str(tmp_path / "prompt.txt")) == expected("import os")
    assert given("-i", "# a", "--file", str(tmp_path / "prompt.txt")) == expected("# a\nimport os")
    assert given("-i", "# a", "--file", "-", stdin=b"import os\n\n") == expected("# a\nimport os\n")
    assert given("-i", "# a", stdin=b"not read") == expected("# a")


def test_the_chat_template_is_used_where_asked_for(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(small, threads=1)
    hi = [{"role": "user", "content": "hi"}]
    cases: list[tuple[list[str], list[int]]] = [
        (["--chat-template"], model.chat_prompt(hi)),
        (["--think"], model.chat_prompt(hi, thinking=True)),
        (["-r", "0"], model.chat_prompt(hi, thinking=False)),
        (["-y", "be"], model.chat_prompt([{"role": "system", "content": "be"}, *hi])),
    ]
    for flags, prompt in cases:
        done = in_process(capsys, small, "-i", "hi", "-n", "12", "-s", "1", "--json", *flags)
        generation = model.generate(prompt, 12, seed=1)
        list(generation)
        reply = json.loads(done.out)
        assert (reply["text"], reply["thinking"]) == (generation.reply.text, generation.reply.thinking)
        assert reply["prompt_tokens"] == len(prompt)


def test_json_is_one_line_that_tells_everything(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, *COMPLETE, "-i", PROMPT, "-n", "5", "-s", "3", "--json", "--logprobs", "2")
    assert done.status == 0 and done.out.count("\n") == 1
    reply = json.loads(done.out)
    events = list(model.generate(model.tokenizer.encode(PROMPT), 5, seed=3, logprobs=2))
    assert reply["text"] == "".join(event.text for event in events)
    assert [t["token"] for t in reply["logprobs"]] == [event.token for event in events]
    assert [t["logprob"] for t in reply["logprobs"]] == [event.logprob for event in events]
    assert [[(u["token"], u["logprob"]) for u in t["top_logprobs"]] for t in reply["logprobs"]] == [
        event.top_logprobs for event in events
    ]
    assert (reply["finish_reason"], reply["seed"], reply["generated_tokens"]) == ("length", 3, 5)
    assert reply["prefill_seconds"] > 0 and reply["tool_calls"] == [] and reply["thinking"] == ""


def test_a_reply_is_held_to_the_schema_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4}')
    done = in_process(capsys, *COMPLETE, "-i", PROMPT, "--schema", str(path), "-s", "1")
    items = json.loads(done.out)
    assert done.status == 0 and 2 <= len(items) <= 4 and set(items) <= {"a", "b"}
    as_json = in_process(capsys, *COMPLETE, "-i", PROMPT, "--schema", str(path), "-s", "1", "--json")
    reply = json.loads(as_json.out)
    assert json.loads(reply["text"]) == items and reply["finish_reason"] == "stop"
    answer = in_process(capsys, "-i", "hi", "--no-think", "--schema", str(path), "-s", "1", "--json")
    assert 2 <= len(json.loads(json.loads(answer.out)["text"])) <= 4  # also where it is an answer
    short = in_process(capsys, *COMPLETE, "-i", PROMPT, "--schema", str(path), "-n", "1")
    assert short.out.strip() == "[" and "ended by length (-n), before its JSON was complete" in short.err


def test_flags_reach_the_sampler(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "-t 0.9 -p 0.7 --top-k 9 --min-p 0.01 --presence-penalty 1 --frequency-penalty 0.2 "
        "--repetition-penalty 1.1 --logit-bias 13=-3 --logit-bias 220=2 -s 5"
    ).split()
    sampling = {"temperature": 0.9, "top_p": 0.7, "top_k": 9, "min_p": 0.01, "seed": 5}
    penalties = {"presence_penalty": 1.0, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    bias = {13: -3.0, 220: 2.0}
    prompt = model.tokenizer.encode(PROMPT)
    expected = text_of(model, prompt, 40, logit_bias=bias, **sampling, **penalties)
    assert in_process(capsys, *COMPLETE, "-i", PROMPT, "-n", "40", *flags).out == expected.rstrip("\n") + "\n"
    stop = expected[10:13]
    stopped = in_process(capsys, *COMPLETE, "-i", PROMPT, "-n", "40", *flags, "--stop", stop)
    assert stopped.out == expected[: expected.index(stop)].rstrip("\n") + "\n"


def test_threads_isa_and_cache_type_change_no_letter_that_they_should_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = engine.isa()
    try:
        results = [
            in_process(capsys, *COMPLETE, "-i", PROMPT, "-n", "30", "-s", "2", "-j", threads, "--isa", isa)
            for threads in ("1", "2")
            for isa in engine.runnable_isas()
        ]
    finally:
        engine.set_isa(before)
    assert len({result.out for result in results}) == 1
    assert all(
        f"{isa} (--isa)" in result.err
        for result, isa in zip(results, 2 * engine.runnable_isas(), strict=True)
    )


# ----------------------------------------------------------------------------
# What is answered and what is completed


def prompt_tokens_of(result: Result) -> int:
    return int(json.loads(result.out)["prompt_tokens"])


def test_a_chat_model_answers_a_prompt_unless_a_mode_or_raw_asks_for_its_continuation(
    small: str, tmp_path: Path
) -> None:
    model = Model(small, threads=1)
    answered = len(model.chat_prompt([{"role": "user", "content": "hi"}]))
    completed = len(model.tokenizer.encode("hi"))
    (tmp_path / "file").write_text("hi\n")
    for sources, stdin in ((["-i", "hi"], b""), (["--file", str(tmp_path / "file")], b""), ([], b"hi\n")):
        for options, expected, said in [
            ([], answered, "| chat template, thinking on |"),
            (["-m", "generate", "--chat-template"], answered, "| chat template, thinking on |"),
            (["-m", "generate", "--no-think"], answered, "| chat template, thinking off |"),
            (["-m", "generate"], completed, "| raw text |"),
            (["--raw"], completed, "| raw text |"),
            (["-m", "generate", "--raw"], completed, "| raw text |"),
        ]:
            done = command(small, *sources, *options, "-n", "2", "--json", input=stdin)
            assert done.status == 0 and said in done.err, done.err
            if "--no-think" not in options:
                assert prompt_tokens_of(done) == expected, (sources, options)


def test_a_model_without_a_template_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = without_template(tmp_path)
    done = in_process(capsys, path, "-i", "hi", "-n", "2", "--json")
    assert done.status == 0 and "| raw text |" in done.err
    assert prompt_tokens_of(done) == len(Model(path, threads=1).tokenizer.encode("hi"))
    done = in_process(capsys, path, "-i", "hi", "--chat-template")
    assert done.status == 2 and "no chat template" in done.err


def test_help_states_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(in_process(capsys, "--help").out.split())
    assert (
        "Without -m a model with a chat template chats on a terminal and answers what comes with -i, --file "
        "or a "
        "pipe; -m generate, --raw and a model without a template complete it as text"
    ) in said


@pytest.mark.parametrize("option", [[], ["--chat-template"], ["--raw"], ["-m", "generate"]])
def test_an_empty_prompt_is_refused_whatever_becomes_of_it(
    option: list[str], small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = in_process(capsys, small, "-i", "", *option)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("run.py: error: prompt is empty: there is nothing to ")


def without_template(directory: Path) -> str:
    return with_template(ModelFile(export_small_model(directory)), directory / "base.bin", "")


def with_template(file: ModelFile, path: Path, template: str) -> str:
    """The same model with another chat template."""
    with ModelWriter(path, file.config, file.metadata, file.tokenizer, template) as writer:
        for tensor in writer.tensors:
            writer.write(file.data(tensor))
            writer.end_tensor()
    return str(path)


# ----------------------------------------------------------------------------
# A file that is not a model.bin


def test_what_is_not_a_model_bin_says_what_it_is_and_what_to_do(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "model.bin").write_bytes(Path(small).read_bytes())
    (tmp_path / "empty").mkdir()
    (tmp_path / "a b.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "pointer.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"
    )
    (tmp_path / "page.bin").write_text("<!doctype html><html><body>404</body></html>")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    header = b'{"__metadata__":{"format":"pt"}}'
    tensors = len(header).to_bytes(8, "little") + header
    (tmp_path / "hf" / "model.safetensors").write_bytes(tensors)
    (tmp_path / "alone.safetensors").write_bytes(tensors)
    missing = "No such file or directory"
    makes_one = "`python export.py DIR model.bin` makes one of a Hugging Face model or a GGUF file"
    for path, expected in {
        "hf": "hf: is a directory, not a model.bin; `python export.py hf model.bin` converts it",
        "box": "box: is a directory, not a model.bin; did you mean box/model.bin?",
        "empty": "empty: is a directory, not a model.bin",
        "a b.gguf": "a b.gguf: not a model.bin but a GGUF file; `python export.py 'a b.gguf' model.bin` "
        "converts it",
        "pointer.bin": "pointer.bin: not a model.bin but a git-lfs pointer; "
        "`git lfs pull` in its folder fetches the file itself",
        "page.bin": "page.bin: not a model.bin but a web page; the download brought no model; "
        "`python run.py OWNER/NAME` fetches one",
        "pytorch_model.bin": "pytorch_model.bin: not a model.bin but a PyTorch or zip file; "
        "export.py converts a folder with *.safetensors, or a GGUF file",
        "hf/model.safetensors": "hf/model.safetensors: not a model.bin but a safetensors file; "
        "`python export.py hf model.bin` converts its folder",
        "alone.safetensors": "alone.safetensors: not a model.bin but a safetensors file; "
        "`python export.py . model.bin` converts its folder",
        "no/model.bin": f"no/model.bin: {missing}; {makes_one}",
        "hf/Qwen3-0.6B": f"hf/Qwen3-0.6B: {missing}; {makes_one}",  # the folder hf exists
        "model.bin": f"model.bin: {missing}; {makes_one}",
        "/no/Qwen3": f"/no/Qwen3: {missing}; {makes_one}",
    }.items():  # fmt: skip
        with pytest.raises(ModelFileError) as caught:
            Model(path)
        assert str(caught.value) == expected
        for options in (["-i", "x"], ["-m", "info"]):
            done = in_process(capsys, path, *options)
            assert (done.status, done.out, done.err) == (2, "", f"run.py: error: {expected}\n")


@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_name_of_a_mode_where_the_model_stands_is_recognised(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ([mode], [mode, TINY], [TINY, mode]):
        done = in_process(capsys, *arguments)
        expected = f"run.py: error: {mode}: No such file or directory; did you mean -m {mode}?\n"
        assert (done.status, done.err) == (2, expected)
    # a file that is named like a mode is taken for a file
    (tmp_path / mode).write_bytes(TINY_QWEN3.read_bytes())
    assert in_process(capsys, mode, "-m", "info").status == 0


# ----------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["/nowhere/model.bin", "-i", "x"], "/nowhere/model.bin: No such file or directory"),
        (["{dir}", "-i", "x"],
         "{dir}: is a directory, not a model.bin; `python export.py {dir} model.bin` converts it"),
        (["{text}", "-i", "x"], "{text}: not a model.bin: starts with b'not a mo', expected b'QWEN3C"),
        (["{text}", "-m", "info"], "{text}: not a model.bin"),
        (["-i", "x", "-t", "-1"], "temperature = -1.0 is not a number from 0 to 100"),
        (["-i", "x", "-t", "warm"], "argument -t/--temperature: invalid float value: 'warm'"),
        (["-i", "x", "-p", "1.5"], "top_p = 1.5 is not a number from 0 to 1"),
        (["-i", "x", "-s", "-1"], "seed = -1 is not a whole number from 0 to 18446744073709551615"),
        (["-i", "x", "-c", "4096"], "context 4096 is more than the model's 2048"),
        (["-i", "x", "-c", "-1"], "argument -c/--context/--ctx: -1 is not at least 0"),
        (["-i", "x", "-j", "0"], "argument -j/--threads: 0 is not at least 1"),
        (["-i", "x", "-j", "2000"], "threads = 2000 is outside 1..1024"),
        (["-i", "x", "--think", "--no-think"], "argument --no-think: not allowed with argument --think"),
        (["-i", "x", "-r", "1", "--no-think"],
         "argument --no-think: not allowed with argument -r/--reasoning"),
        (["-i", "x", "--raw", "--chat-template"],
         "argument --chat-template: not allowed with argument --raw"),
        (["-i", "x", "--raw", "-y", "x"], "--raw completes text, which has no system prompt"),
        (["-i", "x", "--raw", "-r", "0"], "--raw completes text, which has no switch for thinking"),
        (["-i", "x", "--json", "--hide-thinking"], "--hide-thinking is for text"),
        (["-i", "x", "-r", "2"], "argument -r/--reasoning: '2' is neither 0 nor 1"),
        (["-i", "x", "--isa", "z80"], "z80"),
        (["-i", "x", "--stop", ""], "non-empty strings"),
        (["-i", "x", "--logit-bias", "5"], "argument --logit-bias: '5' is not TOKEN=BIAS"),
        (["-i", "x", "--logit-bias", "5000=1"], "token 5000 does not exist, the vocabulary has 4095 tokens"),
        (["-i", "x", "--logprobs", "2"], "--logprobs needs --json"),
        (["-i", ""], "prompt is empty"),
        (["-i", "x " * 3000], "tokens, the context holds 2048"),
        (["-i", "x\udcff"], "--prompt: character 1 is not UTF-8 text"),
        (["-i", "x", "--schema", "/nowhere/schema.json"], "/nowhere/schema.json: No such file or directory"),
        (["-i", "x", "--schema", "{text}"], "{text}: schema is not JSON: Expecting value"),
        (["-i", "x", "--schema", "{not}"], '{not}: Unimplemented keys: ["not"]'),
        (["--file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt: No such file or directory"),
        (["--file", "{binary}"], "{binary}: byte 2 is not UTF-8 text"),
        (["-i", "x", "-y", "a", "--system-file", "b"], "--system and --system-file are two system prompts"),
        (["-m", "chat", "-i", "x"], "-i/--prompt belongs to -m generate or trace, not to -m chat"),
        (["-m", "talk"], "argument -m/--mode: invalid choice: 'talk'"),
        (["-m", "generate", "--verify"], "--verify belongs to -m info"),
        (["-m", "perplexity"], "-m perplexity needs a text"),
        (["-m", "perplexity", "/nowhere/text"], "/nowhere/text: No such file or directory"),
        (["-m", "perplexity", "{one}"], "the text is 1 tokens, at least 2 are needed"),
        (["-m", "perplexity", "{text}", "-c", "5000"], "a window of 5000 tokens is outside 2..2048"),
        (["a.bin", "b.bin", "-i", "x"], "one model at a time, not 2: a.bin b.bin"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_status_2(
    args: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: str(tmp_path / name) for name in ("dir", "text", "binary", "one", "not")}
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "config.json").write_text("{}")
    (tmp_path / "text").write_text("not a model")
    (tmp_path / "binary").write_bytes(b"ab\xff")
    (tmp_path / "one").write_text("a")
    (tmp_path / "not").write_text('{"not": {}}')
    done = in_process(capsys, *(arg.format(**places) if "{" in arg else arg for arg in args))
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("run.py: error: ") and complaint.format(**places) in done.err
    assert done.err.count("\n") == 1


def test_a_model_that_cannot_chat_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ModelFile(export_small_model(tmp_path))
    for name, template, complaint in [
        ("none.bin", "", "no chat template"),
        (
            "loop.bin",
            "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}",
            "processor time",
        ),
    ]:
        with_template(file, tmp_path / name, template)
        done = in_process(capsys, str(tmp_path / name), "-m", "chat")
        assert done.status == 2 and complaint in done.err and done.err.count("\n") == 1
        assert in_process(capsys, str(tmp_path / name), "--raw", "-i", "x", "-n", "2").status == 0


def test_a_switch_the_model_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(export_small_model(tmp_path, thinking="always"))
    done = in_process(capsys, path, "-i", "x", "--no-think")
    assert done.status == 2 and "this model always thinks" in done.err


# ----------------------------------------------------------------------------
# Surroundings


def test_help_needs_no_heavy_library() -> None:
    script = (
        "import sys, qwen3c.cli.run\n"
        "try: qwen3c.cli.run.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'tokenizers', 'jinja2', 'qwen3c.engine', 'subprocess'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--repetition-penalty" in done.stdout


@pytest.mark.parametrize(
    ("started_as", "name"),
    [
        (["{folder}/qwen3c"], "qwen3c"),
        (["{folder}/run.py"], "run.py"),
        (["{folder}/anything"], "run.py"),
        (["-m", "qwen3c"], "python -m qwen3c"),
    ],
)
def test_help_and_errors_have_the_name_that_was_typed(
    started_as: list[str], name: str, tmp_path: Path
) -> None:
    # what pip writes for an installed command
    script = "import sys\nfrom qwen3c.cli.run import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    for file in ("qwen3c", "run.py", "anything"):
        (tmp_path / file).write_text(script)
    command = [sys.executable, *(part.format(folder=tmp_path) for part in started_as)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def said(*args: str) -> tuple[str, str]:
        done = subprocess.run(
            [*command, *args], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
        )
        return done.stdout, done.stderr

    assert said("--help")[0].startswith(f"usage: {name} [MODEL] ")
    for wrong in (["--nonsense"], ["/nowhere/model.bin", "-m", "info"]):
        assert said(*wrong)[1].startswith(f"{name}: error: ")
    assert f"text: {name} [MODEL] -m perplexity FILE" in said("-m", "perplexity")[1]


@pytest.mark.parametrize(
    "command", [["run.py", "-i", "x"], ["run.py"], ["-m", "qwen3c"], ["export.py", "{hf}", "out"]]
)
def test_an_engine_that_was_not_built_is_one_line_that_says_how(command: list[str], tmp_path: Path) -> None:
    unbuilt = tmp_path / "unbuilt"
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "training")
    shutil.copytree(ROOT / "qwen3c", unbuilt / "qwen3c", ignore=ignored)
    for script in ("run.py", "export.py"):
        shutil.copy(ROOT / script, unbuilt)
    hf = write_small_model(tmp_path / "hf")
    done = subprocess.run(
        [sys.executable, *(part.format(hf=hf) for part in command)],
        cwd=unbuilt, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert (
        "error: the engine is not built: `make run` (or `pip install .`) in the folder of qwen3c"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write: No space left on device"),
        (OSError(errno.EIO, "Input/output error"), 1, "cannot write: Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "Too many open files: the limit is "),
        (OSError(errno.EMFILE, "Too many open files", "x"), 2, "x: Too many open files"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2,
         "out of memory: a smaller context (-c) takes less"),
        (MemoryError(), 2, "out of memory: a smaller context (-c) takes less"),
        (RuntimeError("can't start new thread"), 2, "can't start new thread"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_says_what_was_short(
    error: Exception,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(run_modes, "MODES", {"info": fail})
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # or this test's own stdout would be closed
    done = in_process(capfd, "-m", "info")
    assert done.status == status and done.err.count("\n") == 1
    assert done.err.startswith(f"run.py: error: {said}")


@pytest.mark.skipif(not engine.OPENMP, reason="without OpenMP there is one thread")
def test_the_banner_says_who_chose_the_threads_and_a_note_that_they_are_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*args: str, **environment: str) -> list[str]:
        for name in THREAD_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = in_process(capsys, *COMPLETE, "-i", "x", "-n", "1", *args)
        return done.err.splitlines()

    n = n_cpus()
    for args, environment, expected in [
        ([], {}, rf"threads {default_threads_without_environment(monkeypatch)} \|"),
        (["-j", "1"], {}, r"threads 1 \(-j\) \|"),
        ([], {"OMP_NUM_THREADS": "1"}, r"threads 1 \(OMP_NUM_THREADS\) \|"),
        ([], {"OMP_NUM_THREADS": "2", "QWEN3C_THREADS": "1"}, r"threads 1 \(QWEN3C_THREADS\) \|"),
        (["-j", "1"], {"QWEN3C_THREADS": "many"}, r"threads 1 \(-j\) \|"),
    ]:
        chosen, _ = told(*args, **environment)
        assert re.search(expected, chosen), chosen
    note, chosen, _ = told("-j", str(n + 1))
    assert note == f"note: {n + 1} threads, but this process may use {n} processors"
    assert told(QWEN3C_THREADS="many") == [
        "run.py: error: QWEN3C_THREADS is 'many', not a number of threads from 1 to 1024"
    ]


def default_threads_without_environment(monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as context:
        for name in THREAD_VARIABLES:
            context.delenv(name, raising=False)
        return default_threads()


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [*RUN, *COMPLETE, "-i", PROMPT, "-n", "2000", "-t", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read().decode().count("\n") == 1  # what was chosen, and no traceback


@pytest.mark.parametrize(
    ("shell", "status", "complaint"),
    [
        ("{run} -i x -n 3 > /dev/full", 1, "run.py: error: cannot write: No space left on device"),
        ("{run} -m info > /dev/full", 1, "run.py: error: cannot write: No space left on device"),
        ("{run} -i x -n 3 >&-", 0, ""),
        ("{run} -i x -n 3 2>&-", 0, ""),
        ("{run} <&-", 2, "prompt is empty"),
        ("{run} -m chat <&-", 0, ""),
        ("LC_ALL=C LANG=C {run} -i é -n 3", 0, ""),
        ("LC_ALL=en_US.ISO-8859-1 PYTHONUTF8=0 {run} -i x -n 3", 0, ""),
        ("env -u HOME -u XDG_STATE_HOME {run} -m chat -n 3 < /dev/null", 0, ""),
        ("HOME=/proc {run} -m chat -n 3 < /dev/null", 0, ""),
        ("printf 'a\\377' | {run} -n 3", 2, "stdin: byte 1 is not UTF-8 text"),
    ],
)  # fmt: skip
def test_odd_surroundings_bring_no_traceback(shell: str, status: int, complaint: str) -> None:
    shell = shell.replace("{run}", " ".join(RUN))
    done = subprocess.run(["sh", "-c", shell], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    err = done.stderr.decode()
    assert done.returncode == status, err
    assert "Traceback" not in err and "Exception ignored" not in err
    assert complaint in err


def test_ctrl_c_ends_a_completion_and_keeps_its_text(model: Model) -> None:
    process = subprocess.Popen([*RUN, *COMPLETE, "-i", PROMPT, "-n", "2000", "-t", "2", "-s", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err.decode()
    assert err.decode().rstrip().endswith("| stopped")
    shown, full = (first + out).decode().rstrip("\n"), ""
    for event in model.generate(model.tokenizer.encode(PROMPT), 2000, temperature=2.0, seed=1):
        full += event.text
        if len(full) > len(shown):
            break
    assert shown and full.startswith(shown)
