"""The models of a server: each with the settings of its own, none let go of while somebody waits for it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from small_models import TINY_QWEN3
from test_config import load

from qwen3c import Model
from qwen3c.cli.serve import _options
from qwen3c.serve.errors import ApiError
from qwen3c.serve.models import Models, ServeOptions


def opened() -> Model:
    return Model(str(TINY_QWEN3), threads=1)


def test_a_model_is_served_as_its_own_settings_say(tmp_path: Path) -> None:
    text = """context = 100
    [models]
    usual = "a.bin"
    own = { path = "b.bin", context = 50, cache_memory = "1 MiB", threads = 1 }
    whole = { path = "c.bin", context = 0 }
    """
    settings = load(tmp_path, text)
    options = ServeOptions(context=settings.context, kv_bytes=8 << 20)
    own = {alias: _options(options, model) for alias, model in settings.models.items()}

    async def contexts() -> list[int]:
        files = dict.fromkeys(own, TINY_QWEN3)
        models = Models(dict.fromkeys(own, opened), options, None, files, own)
        cards = [await models.card(alias) for alias in own]
        told = [card.context for card in cards if card is not None]
        async with models.open():
            served = [await models.get(alias) for alias in own]
            kv = [one.scheduler.limits.kv_bytes for one in served]
            assert kv[0] == kv[2] == 8 << 20 and kv[1] < 8 << 20
            assert [one.context for one in served][:2] == told[:2]
            return told

    assert asyncio.run(contexts()) == [100, 50, 2048]
    assert settings.models["own"].threads == 1


def test_a_model_that_somebody_waits_for_is_not_let_go_of() -> None:
    async def serve() -> None:
        models = Models({"m": opened}, ServeOptions(kv_bytes=8 << 20))
        served = await models.get()
        gate = threading.Event()
        work = asyncio.ensure_future(served.work(gate.wait, 20))
        await asyncio.sleep(0)
        assert served.is_busy and not served.scheduler.n_running
        with pytest.raises(ApiError, match="while the others are busy"):
            models._make_room(1 << 60)
        assert models.loaded == [served]
        gate.set()
        assert await work and not served.is_busy
        models.close()

    asyncio.run(serve())
