"""Ask PEFT what it makes of the folders that jslora's writer made (see `../written_cases.py`).

Runs where torch, transformers and peft are installed at the versions of `make_peft.py`; the tests
never import them:

    python tests/adapters/goldens/make_written.py

`written.json` has, for each folder in `written` and each layer that PEFT adapted on loading it,
rank, scaling and a few numbers of the weight delta.
"""

import json
from pathlib import Path

from make_peft import check_versions, deltas
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent


def main() -> None:
    check_versions()
    config = LlamaConfig(**json.loads((ROOT / "written" / "model.json").read_text()))
    golden = {
        folder.name: deltas(PeftModel.from_pretrained(LlamaForCausalLM(config), str(folder)))
        for folder in sorted((ROOT / "written").iterdir())
        if folder.is_dir()
    }
    (ROOT / "written.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
