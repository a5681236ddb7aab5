"""Runs vLLM, in an environment without spul, until its input ends: `python vllm_engine.py JOB.json RESULT.json`.

The job: `base` (folder), `exported` (folder by name of prompt), `requests` (prompt's name or None, ids, position) for
one offline batch, `completions` (the same) and `chats` (prompt's name or None, messages) over HTTP. The result: new
token ids by kind, and the server's `url`, where it goes on to answer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

NUM = 4  # new tokens at most
SETTINGS = {"temperature": 0.0, "max_tokens": NUM}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # offline, one process is enough
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def client(folder):
    """The client module as it lies in an exported folder."""
    spec = importlib.util.spec_from_file_location("soft_prompt", Path(folder, "soft_prompt.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def offline(job, prompts, without_prompt):
    from vllm import LLM, SamplingParams

    llm = LLM(job["base"], dtype="float32", enforce_eager=True, enable_prompt_embeds=True, max_num_seqs=16)
    requests = [
        without_prompt(ids) if name is None else prompts[name].request(ids, position)
        for name, ids, position in job["requests"]
    ]
    found = llm.generate(requests, SamplingParams(**SETTINGS), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


@contextmanager
def server(job):
    """The address of vLLM's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    template = next(path for folder in job["exported"].values() for path in Path(folder).glob("*.jinja"))
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        job["base"],
        "--dtype",
        "float32",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--enable-prompt-embeds"]
    command += ["--max-num-seqs", "16", "--chat-template", str(template), "--chat-template-content-format", "openai"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health", process)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def http(job, prompts, url):
    common = {"model": job["base"], "return_token_ids": True, **SETTINGS}
    found = {"completions": [], "chats": [], "chat_prompts": []}
    for name, ids, position in job["completions"]:
        own = {"prompt": ids} if name is None else prompts[name].completion(ids, position)
        found["completions"].append(post(f"{url}/v1/completions", common | own)["choices"][0]["token_ids"])
    for name, messages in job["chats"]:
        own = {"messages": messages if name is None else prompts[name].messages(messages)}
        answer = post(f"{url}/v1/chat/completions", common | own)
        found["chats"].append(answer["choices"][0]["token_ids"])
        found["chat_prompts"].append(answer["prompt_token_ids"])
    return found


def wait_for(url, process, seconds=300):
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=5).status
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no answer from {url}")


def post(url, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        return json.load(urllib.request.urlopen(request, timeout=60))
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read().decode()}") from error


def main():
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ.update(ENVIRONMENT)
    assert importlib.util.find_spec("peft") is None, "expected an environment without PEFT"
    assert importlib.util.find_spec("spul") is None, "expected an environment without spul"
    modules = {name: client(folder) for name, folder in job["exported"].items()}
    prompts = {name: module.SoftPrompt() for name, module in modules.items()}  # of its own folder
    without_prompt = next(iter(modules.values())).without_prompt
    started = time.time()
    result = {"offline": offline(job, prompts, without_prompt)}
    print(f"offline: {time.time() - started:.0f} s", file=sys.stderr)
    with server(job) as url:
        result |= {"url": url, **http(job, prompts, url)}
        print(f"in all: {time.time() - started:.0f} s", file=sys.stderr)
        part = Path(f"{sys.argv[2]}.part")
        part.write_text(json.dumps(result), encoding="utf-8")
        part.replace(sys.argv[2])
        sys.stdin.read()


if __name__ == "__main__":  # vLLM starts processes that import this module
    main()
