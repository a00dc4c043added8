"""The commands that took this one's place."""

if __name__ == "__main__":
    raise SystemExit(
        "python -m analysis is gone: use `lorasweep answer NAME` or `lorasweep fit FILE`"
    )
