"""Our image without clawtrio: by hand, with the input on stdin."""

from __future__ import annotations

import json
import subprocess
import uuid
from pathlib import Path

import pytest
import trio

from tests.anthropic_api import Text, open_api
from tests.e2e.conftest import RUNTIMES
from tests.test_agent_runner import INPUT

from .conftest import BOUND


@pytest.mark.parametrize("runtime_name", RUNTIMES[:2], indirect=True)
async def test_image_by_hand(runtime_name: str, tmp_path: Path) -> None:
    """It answers NanoClaw's input, then a file, and leaves because of another one."""
    name = f"clawtrio-test-{uuid.uuid4().hex}"
    inbox = tmp_path / "ipc" / "input"
    inbox.mkdir(parents=True)
    for directory in (inbox.parent, inbox):
        directory.chmod(0o777)
    follow_up = json.dumps({"type": "message", "text": "and then?"})

    with trio.fail_after(BOUND):
        async with open_api(Text(("Hello.",)), Text(("Then?",))) as api:
            process = await trio.lowlevel.open_process(
                [
                    *(runtime_name, "run", "-i", "--rm", "--name", name),
                    # The fake is on the host's loopback.
                    *("--network", "host", "-v", f"{inbox.parent}:/workspace/ipc"),
                    *("-e", "ANTHROPIC_API_KEY=key"),
                    *("-e", f"ANTHROPIC_BASE_URL={api.url}"),
                    "clawtrio-agent:latest",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                await process.stdin.send_all(json.dumps(INPUT).encode())
                await process.stdin.aclose()
                seen = b""
                for text, file, content in (
                    (b'"Hello."', "1.json", follow_up),
                    (b'"Then?"', "_close", ""),
                ):
                    while text not in seen:
                        chunk = await process.stdout.receive_some()
                        assert chunk, seen
                        seen += chunk
                    (tmp_path / file).write_text(content)
                    (tmp_path / file).rename(inbox / file)
                assert await process.wait() == 0
            finally:
                with trio.CancelScope(shield=True):
                    gone = [runtime_name, "rm", "-f", name]
                    await trio.run_process(gone, check=False, capture_stderr=True)
                    await process.wait()
                    await process.stdout.aclose()
