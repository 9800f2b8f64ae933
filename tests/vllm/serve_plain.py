"""Do what serve.py does, with layers that plain.py decodes; with the same arguments."""

import plain
import serve
import without_gpu


def main() -> None:
    take_back = without_gpu.take_any_experts()
    without_gpu.take_any_linear()
    plain.decode_after_loading(take_back)
    serve.main()


if __name__ == "__main__":
    main()
