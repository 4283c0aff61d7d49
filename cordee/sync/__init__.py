"""Between islands: when they speak and how it is written."""
