"""Score pictures with a file that `panda export` wrote. Needs onnxruntime, numpy and Pillow alone.

python onnx_score.py detector.onnx photos/*.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
rule = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])["intensity"]
if rule != "auto":
    sys.exit(f"The detector takes values by the rule {rule}: map those of each picture by it first, as `panda` does.")
for path in sys.argv[2:]:
    with open(path, "rb") as file:
        head = file.read(25)
    with Image.open(path) as image:
        if image.mode[0] in "IF" or (head[1:4] == b"PNG" and head[24] == 16):
            sys.exit(f"{path} has more than 8 bits a value: make 8 of them as the file's metadata say under intensity.")
        rgb = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    outputs = session.run(None, {"images": rgb.transpose(2, 0, 1)[None]})
    found = dict(zip(names, outputs, strict=True))
    said = [f"{name} {found[name][0]:.6g}" for name in names if name != "map"]
    print(path, *said)
