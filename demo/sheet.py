"""All pictures on one sheet: a column for each phase, eager above compiled, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL_PX, MARGIN_PX, CAPTION_PX, LABEL_PX = 224, 12, 44, 100
BACKGROUND, INK, FAINT = (250, 250, 248), (30, 30, 30), (110, 110, 110)


def contact_sheet(
    captions: Sequence[tuple[str, str]], rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path
) -> Path:
    """Writes the sheet as PNG. `captions`: two lines over each column; `rows`: a label and its pictures."""
    step_x, step_y = CELL_PX + MARGIN_PX, CELL_PX + MARGIN_PX
    size = (LABEL_PX + step_x * len(captions) + MARGIN_PX, CAPTION_PX + step_y * len(rows) + MARGIN_PX)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(16), ImageFont.load_default(12)
    for column, (title, detail) in enumerate(captions):
        left = LABEL_PX + column * step_x
        draw.text((left, 8), title, INK, large)
        draw.text((left, 27), detail, FAINT, small)
    for row, (label, pictures) in enumerate(rows):
        top = CAPTION_PX + row * step_y
        draw.text((MARGIN_PX, top + CELL_PX // 2), label, INK, large)
        for column, picture in enumerate(pictures):
            sheet.paste(_fitted(picture), (LABEL_PX + column * step_x, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture inside a cell, whole, on the sheet's background."""
    scale = CELL_PX / max(picture.size)
    resized = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL_PX, CELL_PX), BACKGROUND)
    cell.paste(resized, ((CELL_PX - resized.width) // 2, (CELL_PX - resized.height) // 2))
    return cell
