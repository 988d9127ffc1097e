"""llama.cpp's own server in a process of its own, which may end with a damaged file without anything else ending.

Run by path, on any interpreter that has xllamacpp; nothing of Firefly is imported. The first line on stdin says what to
serve (JSON); the first line on stdout, where. It ends when stdin does.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

UNUSABLE = "unusable: "
"""What stands before the reason, where xllamacpp does not run on this machine."""


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # llama.cpp writes to both

    try:
        xllamacpp: Any = importlib.import_module("xllamacpp")
    except ImportError as error:
        sys.exit(print(f"{UNUSABLE}{error}", file=answers, flush=True))

    params = xllamacpp.CommonParams()
    params.model.path = settings["file"]
    if settings["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["lora"], 1.0)]
    params.n_ctx = settings["context"]
    params.n_batch = params.n_ubatch = min(512, settings["context"])
    if settings["exact"]:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    # On the CPU, whatever else is there: the numbers of one machine are those of another.
    params.n_gpu_layers = 0
    params.no_kv_offload = params.no_op_offload = True
    # The file's pages, without a copy, and nothing beside them: neither repacked weights nor saved prompts.
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.no_extra_bufts = True
    params.fit_params = params.warmup = False
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    params.use_jinja = params.offline = True
    params.api_keys = [settings["key"]]
    params.hostnames, params.port, params.n_threads_http = ["127.0.0.1"], 0, 2
    params.ui = params.endpoint_slots = False
    params.verbosity = 2  # warnings and errors: there are thousands of requests
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        time.sleep(0.5)  # why stands in the log, which llama.cpp writes from a thread of its own
        raise
    print(server.listening_address, file=answers, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
