"""llm-compressor's `model_free_ptq` to NVFP4 (W4A16), for quantize_layer.py: run in llm-compressor's own environment."""

from __future__ import annotations

import sys


def main() -> None:
    from llmcompressor import model_free_ptq

    source, out = sys.argv[1:3]
    model_free_ptq(
        model_stub=source,
        save_directory=out,
        scheme="NVFP4A16",
        ignore=["lm_head", "re:.*embed_tokens$", "re:.*norm.*", "re:.*mlp.gate$"],
        max_workers=2,
        device="cpu",
    )


if __name__ == "__main__":
    main()
