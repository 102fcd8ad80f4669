"""What start-up prints: what is served, where, and a request to paste."""

import argparse
import base64
import io
from pathlib import Path

from PIL import Image

from hiprune_server.demo import CHECKPOINT, SAMPLES
from hiprune_vllm import __version__


def banner(args: argparse.Namespace, model: str) -> str:
    """Several lines for the terminal, with a request that brings a picture and a budget."""
    host = args.host or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    scheme = "https" if args.ssl_certfile else "http"
    address = f"{scheme}://{host}:{args.port}"
    # Every key that vLLM takes; the line shows a shell variable, never the secret itself.
    key = ' -H "Authorization: Bearer $API_KEY"' if args.api_key else ""
    picture, try_also = sample_picture(), ""
    if Path(args.model) == CHECKPOINT:
        picture = f"data:image/jpeg;base64,'\"$(base64 -w0 {SAMPLES / 'shapes-1.jpg'})\"'"
        try_also = f"\nPictures and questions for it: {SAMPLES}"
    return f"""
hiprune-vllm {__version__}: {model} at {address}/v1
Budgets, defaults and limits: {address}/v1/hiprune{try_also}
Try it:
  curl -s {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{{
    "model": "{model}", "max_tokens": 40, "hiprune": {{"tokens": 192}},
    "messages": [{{"role": "user", "content": [
      {{"type": "text", "text": "What is in this picture?"}},
      {{"type": "image_url", "image_url": {{"url": "{picture}"}}}}]}}]}}'
"""


def sample_picture(size: int = 16) -> str:
    """A small picture as a data URL: a red square on blue, drawn here to need no file."""
    picture = Image.new("RGB", (size, size), (0x30, 0x50, 0xC0))
    picture.paste((0xD0, 0x30, 0x30), (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
