"""Evaluation and bridge with vLLM: in the process, and against a server on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

from places import TINY_RECIPES

pytest.importorskip("vllm")

from oprd.evaluation.evaluate import evaluate
from oprd.evaluation.problems import EvalSettings
from oprd.foundation.errors import UserError
from oprd.models.eos import eos_token_ids
from oprd.models.loading import load_model, load_tokenizer, resolve_model
from oprd.rollouts.engines.choose import ServerEngine, VLLMEngine, choose_engine
from oprd.rollouts.engines.vllm import check_server
from oprd.rollouts.generation import HFEngine, Sampling
from oprd.rollouts.prompts import load_prompts
from oprd.text.rendering import Renderer
from oprd.training.config import OPRDConfig

BRIDGE = TINY_RECIPES / "bridge.yaml"
SETTINGS = EvalSettings(samples=4, sampling=Sampling(64, 1.0, 1.0), batch_size=8)
GREEDY = EvalSettings(samples=1, sampling=Sampling(64, temperature=0), batch_size=16)


@pytest.fixture(scope="module")
def student():
    """Model, tokenizer and folder of the bundled student, in float32."""
    folder = resolve_model("tiny:student")
    return load_model(folder, dtype="float32").eval(), load_tokenizer(folder), folder


@pytest.fixture(scope="module")
def rows():
    return load_prompts("tiny", "test").select(range(8))


@pytest.fixture(scope="module")
def engine(student):
    return choose_engine("auto", None, *student)


@pytest.fixture(scope="module")
def colocated(student, rows, engine, tmp_path_factory):
    """A folder of an evaluation."""
    folder = tmp_path_factory.mktemp("eval") / "colocated"
    evaluate(*student[:2], rows, SETTINGS, folder, "student", progress=False, engine=engine)
    return folder


@pytest.fixture(scope="module")
def server(student, tmp_path_factory):
    """The address of a server of the student."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    options = {"--model": student[2], "--host": "127.0.0.1", "--port": str(port), "--dtype": "float32"}
    options["--weight-transfer-config"] = '{"backend": "nccl"}'  # as TRL asks of a server
    options["--logprobs-mode"] = "processed_logprobs"
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    process = subprocess.Popen(
        [*argv, *(word for option in options.items() for word in option)],
        env={**os.environ, **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url, process, log):
    for _ in range(180):
        assert process.poll() is None, log.seek(0) or log.read()[-3000:]
        try:
            with urlopen(f"{url}/health", timeout=1):
                return
        except (URLError, OSError):
            time.sleep(1)
    raise AssertionError("the server did not start")


def samples(folder):
    return (folder / "samples.jsonl").read_bytes()


def test_auto_takes_vllm_where_it_is_installed(student, engine):
    assert isinstance(engine, VLLMEngine) and engine.name == "vllm"
    assert isinstance(choose_engine("hf", None, *student), HFEngine)


def test_an_evaluation_names_its_engine_and_draws_every_sample_anew(colocated):
    assert json.loads((colocated / "settings.json").read_text())["engine"] == "vllm"
    summary = json.loads((colocated / "summary.json").read_text())
    assert 0 < summary["avg_at_k"] < 0.8 and summary["truncated_share"] < 0.5
    lines = [json.loads(line) for line in samples(colocated).splitlines()]
    assert max(len({sample["text"] for sample in line["samples"]}) for line in lines) > 1


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.8])
def test_a_killed_evaluation_resumes_to_the_same_bytes(student, rows, engine, colocated, tmp_path, kept):
    whole = samples(colocated)
    (tmp_path / "settings.json").write_bytes((colocated / "settings.json").read_bytes())
    (tmp_path / "samples.jsonl").write_bytes(whole[: int(kept * len(whole))])
    evaluate(*student[:2], rows, SETTINGS, tmp_path, "student", progress=False, engine=engine)
    assert samples(tmp_path) == whole


def test_a_folder_of_another_engine_is_refused(student, rows, colocated):
    with pytest.raises(UserError, match=r"another engine \('vllm', now 'hf'\)"):
        evaluate(*student[:2], rows, SETTINGS, colocated, "student", progress=False)


def test_greedy_responses_are_those_of_hf(student, rows, engine):
    prompts = Renderer(student[1])(rows["prompt"][:])
    expected = HFEngine(*student[:2]).generate(prompts, GREEDY.sampling, 0)
    assert engine.generate(prompts, GREEDY.sampling, 0) == expected
    assert not all(rollout.truncated for rollout in expected)


def test_a_response_that_reaches_the_limit_is_truncated(student, rows, engine):
    (rollout,) = engine.generate(Renderer(student[1])(rows["prompt"][:1]), Sampling(5, 1.0, 1.0), 0)
    assert rollout.truncated and len(rollout.response_ids) == 5


def test_a_bridge_of_vllm_rollouts_has_the_report_of_hf(start, tmp_path):
    reports = {}
    for engine in ("vllm", "hf"):
        argv = [
            "bridge",
            BRIDGE,
            "--output_dir",
            tmp_path / engine,
            "--num_prompts",
            "96",
            "--engine",
            engine,
        ]
        ended = start("-m", "oprd.cli", *argv)
        assert ended.returncode == 0, ended.stderr[-3000:]
        reports[engine] = json.loads((tmp_path / engine / "report.json").read_text())
        assert reports[engine]["data"]["engine"] == engine
        assert reports[engine]["data"]["rollouts"] == 96
    ours, theirs = reports["vllm"], reports["hf"]
    assert ours.keys() == theirs.keys() and ours["data"].keys() == theirs["data"].keys()
    assert ours["layers"].keys() == theirs["layers"].keys()
    for layer, fit in ours["layers"].items():
        assert fit.keys() == theirs["layers"][layer].keys()
        assert fit["cosine_at_rank"] == pytest.approx(theirs["layers"][layer]["cosine_at_rank"], abs=0.05)


def test_a_server_draws_the_same_samples(start, student, rows, server, colocated, tmp_path):
    remote = choose_engine("auto", server + "/", *student)
    assert isinstance(remote, ServerEngine)
    evaluate(*student[:2], rows, SETTINGS, tmp_path / "a", "student", progress=False, engine=remote)
    assert samples(tmp_path / "a") == samples(colocated)
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["engine"] == "vllm server"
    argv = [
        "--model",
        "tiny:student",
        "--dtype",
        "float32",
        "--data",
        "tiny",
        "--limit",
        "8",
        "--samples",
        "4",
    ]
    argv += ["--batch_size", "8", "--temperature", "1", "--top_p", "1", "--max_new_tokens", "64"]
    command = ["-m", "oprd.cli", "eval", *argv, "--output", tmp_path / "b", "--vllm_server_base_url", server]
    ended = start(*command)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert samples(tmp_path / "b") == samples(colocated)


def test_a_bridge_is_fitted_against_a_server(start, server, tmp_path):
    argv = [
        BRIDGE,
        "--output_dir",
        tmp_path / "bridge",
        "--num_prompts",
        "64",
        "--vllm_server_base_url",
        server,
    ]
    ended = start("-m", "oprd.cli", "bridge", *argv)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads((tmp_path / "bridge" / "report.json").read_text())
    assert report["data"]["engine"] == "vllm server" and report["data"]["rollouts"] == 64


def test_a_server_of_another_model_is_refused(server):
    folder = resolve_model("tiny:teacher")
    teacher, tokenizer = load_model(folder), load_tokenizer(folder)
    engine = ServerEngine(server, teacher, eos_token_ids(teacher, tokenizer))
    with pytest.raises(UserError, match=r"its log-probs differ from the model's by [\d.]+ nats"):
        engine.generate(Renderer(tokenizer)(["Compute 1+2."]), SETTINGS.sampling, 0)


def test_a_request_that_a_server_refuses_is_quoted(student, server):
    engine = choose_engine("vllm", server, *student)
    with pytest.raises(RuntimeError, match=r"refused /v1/completions: HTTP Error 4\d\d.*"):
        engine.generate([[5] * 4000], SETTINGS.sampling, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA a server can be handed weights")
def test_trl_generates_from_the_server_but_hands_no_weights_over_without_cuda(server):
    """Why training against a server is refused on such a machine."""
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(base_url=server)
    config = OPRDConfig(output_dir="unused", bf16=False, report_to="none")
    check_server(client, config)
    config.temperature = 0.7
    with pytest.raises(UserError, match=r"gives processed_logprobs, which temperature: 0\.7 changes"):
        check_server(client, config)
    given = client.generate([[5, 6, 7]], n=2, max_tokens=4)
    assert [len(ids) for ids in given["completion_ids"]] == [4, 4]
    with pytest.raises(NotImplementedError, match="needs a CUDA device, got 'cpu'"):
        client.init_communicator(device="cpu")
