"""A tiny model that can really be served, and worker processes around it."""

from __future__ import annotations

import contextlib
import os
import sys

from dvai_bridge import EngineProcess, LoadRequest
from tests.gguf_writer import F32, I32, Array
from tests.support_gguf import ModelPlan, random_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N_CTX = 2048
END_ID = 2
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "z" * 100]
KINDS = [2, 3, 3, *[6] * 256, 1, 1]


def build_byte_model(metadata=None, **plan) -> bytes:
    """A GGUF file of random weights whose tokens are the 256 bytes and the space: it writes whatever bytes.

    `metadata`: further keys of its header, or other values.
    """
    tokenizer = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": Array(F32, [0.0] * len(PIECES)),
        "tokenizer.ggml.token_type": Array(I32, KINDS),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": END_ID,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return random_model(ModelPlan(n_vocab=len(PIECES), n_ctx=N_CTX, **plan).with_extra(**tokenizer | (metadata or {})))


WORKER = "import sys, dvai_bridge; sys.exit(dvai_bridge.run_worker_process(lambda: b''))"


def build_command(source=WORKER):
    """A worker process that runs `source` with the module at hand."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {ROOT!r})\n{source}"]


@contextlib.asynccontextmanager
async def start_engine(model, *, source=WORKER, on_progress=None, ready=True, **load):
    """An engine process that serves the file `model`; ended on leaving."""
    engine = EngineProcess(
        LoadRequest(model=str(model), **load),
        command=build_command(source),
        on_progress=on_progress,
        restart_delay_s=0.01,
    )
    engine.start()
    try:
        if ready:
            await engine.ready()
        yield engine
    finally:
        await engine.close()
