"""What a sampling command asks for, read and checked before the model is loaded. Never imports torch."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.checkpoints.run import find_run, open_stage
from ldm.config import walk
from ldm.data.decode import BadSample, decode_image
from ldm.errors import LdmError

MAX_PROMPT_CHARACTERS = 10_000
_READ_TEXT = tuple(  # our conditioners that read captions; one of the user's own is asked when the model is loaded
    f"ldm.models.conditioner.{name}"
    for name in ("text_transformer.TextTransformer", "open_clip.OpenClipText", "hf_clip.HFClipText")
)


@dataclass(frozen=True)
class Picture:
    """Where image to image starts.   file: the name without its folder.   sha256: of the file's bytes."""

    image: Image.Image
    file: str
    sha256: str


@dataclass(frozen=True)
class Request:
    """run: a run folder.   prompts: None where none were given.   start: of image to image.   folder: for pictures."""

    run: Path
    prompts: list[str] | None
    start: Picture | None
    folder: Path


def read_request(cfg: Mapping[str, Any]) -> Request:
    """Everything of configs/sample.yaml that names a file or a text. Nothing is left on the disk.

    Raises LdmError when the run, its newest checkpoint, the prompts, the picture or the folder cannot be used.
    """
    run = find_run(cfg["run"])
    prompts = read_prompts(cfg)
    config = open_stage(run, "diffusion", verify="size").document("config")
    if prompts is None and any(value in _READ_TEXT for _, value in walk(config.get("conditioner") or {})):
        raise no_prompt()
    start = None if cfg["image"] is None else read_picture(Path(cfg["image"]))
    folder = Path(cfg["output_dir"])
    check_writable(folder)
    return Request(run, prompts, start, folder)


def read_prompts(cfg: Mapping[str, Any]) -> list[str] | None:
    """`prompt=`, or the lines of `prompts_file=`, or None."""
    if cfg["prompt"] is not None and cfg["prompts_file"] is not None:
        raise no_prompt()
    if cfg["prompts_file"] is not None:
        try:
            text = Path(cfg["prompts_file"]).read_text(encoding="utf-8-sig")
        except OSError as error:
            what = f"cannot read the prompts: {error.strerror}"
            raise LdmError("PROMPT", what, where=f"prompts_file={cfg['prompts_file']}", next=_A_FILE) from error
        except UnicodeDecodeError as error:
            what = f"the prompts are not UTF-8, at byte {error.start}"
            raise LdmError("PROMPT", what, where=f"prompts_file={cfg['prompts_file']}", next=_A_FILE) from error
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise LdmError("PROMPT", "the file holds no prompt", where=cfg["prompts_file"], next="one prompt a line")
    elif cfg["prompt"] is not None:
        prompts = [cfg["prompt"]]
    else:
        return None
    for prompt in prompts:
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise LdmError("PROMPT", "a prompt is too long", limit=f"{MAX_PROMPT_CHARACTERS} characters, {len(prompt)}")
    return prompts


_A_FILE = "name a text file with one prompt a line"


def no_prompt() -> LdmError:
    hint = 'python sample.py prompt="a red star on a blue ground", or prompts_file=prompts.txt'
    return LdmError("PROMPT", "give either a prompt or a file of prompts", next=hint)


def read_picture(path: Path) -> Picture:
    """`image=`, decoded as training decodes."""
    hint = "give a JPEG, PNG or WebP"
    try:
        data = path.read_bytes()
        return Picture(decode_image(data), path.name, hashlib.sha256(data).hexdigest())
    except OSError as error:
        what = f"cannot read the picture: {error.strerror}"
        raise LdmError("IMAGE", what, where=f"image={path}", next=hint) from error
    except BadSample as error:
        what = f"not a usable picture: {error.reason}"
        raise LdmError("IMAGE", what, where=f"image={path}", next=hint) from error


def check_writable(folder: Path) -> None:
    """Try what saving will need; folders that this makes are removed again. Raises LdmError."""
    made: list[Path] = []
    try:
        for place in reversed((folder, *folder.parents)):
            if place.exists() and not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not place.exists():
                place.mkdir()
                made.append(place)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        for place in reversed(made):
            place.rmdir()


def cannot_write(folder: Path, error: OSError) -> LdmError:
    what = f"the pictures cannot be written: {error.strerror}"
    hint = "choose another output_dir=, or free space or make the folder writable"
    return LdmError("DISK", what, where=f"output_dir={folder}", next=hint)
