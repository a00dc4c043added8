"""The settings of a run, as frozen values, whose hash names it; not where or how it is executed."""
