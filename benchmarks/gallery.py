"""Draw the images of docs/gallery.md with the commands of that page."""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

import retinanet as rn

HEIGHT, COUNT = 240, 4
COMMANDS = {
    "labels": "retinanet data show shapes/ --out labels/",
    "anchors": "retinanet data show shapes/ --anchors --recipe paper_quick --out anchors/",
    "augmented": "retinanet data show shapes/ --augmented --out augmented/ "
    "data.mosaic=0.5 data.mixup=0.2 data.rotation=15 data.colour=0.5 data.erase=0.3",
}


def main() -> None:
    target = Path(__file__).resolve().parents[1] / "docs" / "images" / "gallery"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rn.synthetic_dataset(Path(folder) / "shapes", splits={"train": 24, "val": 4}, empty=0.0)
        for name, command in COMMANDS.items():
            words = [sys.executable, "-m", *shlex.split(command), "--count", str(COUNT)]
            subprocess.run(words, cwd=folder, check=True)
            files = sorted((Path(folder) / name).iterdir())
            images = [Image.open(file).convert("RGB") for file in files]
            images = [i.resize((round(i.width * HEIGHT / i.height), HEIGHT)) for i in images]
            row = Image.new("RGB", (sum(image.width for image in images), HEIGHT))
            left = 0
            for image in images:
                row.paste(image, (left, 0))
                left += image.width
            row.save(target / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
