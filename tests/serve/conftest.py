"""One server over the tiny omni artifact, on loopback, for all tests of this room."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from torch_threads import one_torch_thread

NAME = "tiny-omni"


@dataclass
class Running:
    """A server that answers."""

    url: str
    service: Any
    port: int
    server: Any

    def client(self, **options: Any) -> Any:
        """OpenAI's own client, which repeats nothing by itself."""
        import openai

        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        )


@pytest.fixture(scope="session")
def libraries() -> None:
    for needed in ("torch", "transformers", "torchvision", "PIL", "soundfile", "fastapi", "uvicorn", "httpx"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the server's tests need {needed}, which is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_thread(libraries: None) -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="session")
def loaded(libraries: None, tiny_artifact: Path) -> Any:
    """Model and processor; its speech never ends by itself, so that the server's limit decides how long it is."""
    from omnifp4.chat.loading import open_model

    model, processor = open_model(tiny_artifact, None, device="cpu", speech=True)
    end = model.config.talker_config.codec_eos_token_id

    def go_on(_: Any, __: Any, logits: Any) -> Any:
        logits[..., end] = -1e4
        return logits

    model.talker.codec_head.register_forward_hook(go_on)
    return model, processor


@pytest.fixture(scope="session")
def start_server(loaded: Any, tiny_artifact: Path) -> Callable[..., Any]:
    """Starts servers on the shared model; each ends with its context."""
    from omnifp4.serve.running import listen, make_server, open_service
    from omnifp4.serve.settings import Limits, Settings

    @contextmanager
    def start(
        *,
        limits: dict[str, Any] | None = None,
        most_sequences: int = 8,
        send_buffer: int = 0,
        grace_seconds: float = 5.0,
        **settings: Any,
    ) -> Iterator[Running]:
        bounds = Limits(**{"speech_seconds": 1.0, "default_new_tokens": 12, **(limits or {})})
        chosen = Settings(name=NAME, port=0, limits=bounds, **settings)
        model, processor = loaded
        taken = listen(chosen)
        if send_buffer:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        service = open_service(
            model,
            chosen,
            processor=processor,
            decoding="modules",
            most_sequences=most_sequences,
            folder=tiny_artifact,
        )
        server = make_server(service, grace_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = taken.getsockname()[1]
        try:
            yield Running(f"http://127.0.0.1:{port}", service, port, server)
        finally:
            server.should_exit = True
            thread.join(10)
            service.close()
            taken.close()
            assert not thread.is_alive()

    return start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Any]) -> Iterator[Running]:
    """The server with which most tests talk."""
    with start_server() as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Running) -> Any:
    pytest.importorskip("openai", reason="openai is not installed")
    return server.client()
