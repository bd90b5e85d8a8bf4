"""Run the front end with the fake engine: serve_fake.py CONFIG_JSON [OPTIONS OF THE FAKE]."""

import json
import sys
from pathlib import Path

from jslora import config
from jslora.server import frontend

if __name__ == "__main__":
    fake = [sys.executable, str(Path(__file__).with_name("fake_engine.py")), *sys.argv[2:]]
    sys.exit(frontend.main(config.parse(json.loads(sys.argv[1])), fake))
