"""The paper's tables and figures as runs (Lin et al. 2017, Sec. 4 and 5 and the appendices)."""
