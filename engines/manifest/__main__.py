"""``python -m engines.manifest`` prints the JSON schema of ``manifest.json``."""

import json

from engines.manifest import Manifest

if __name__ == "__main__":
    print(json.dumps(Manifest.model_json_schema(), indent=2))
