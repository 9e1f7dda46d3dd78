"""The comparison of methods: its statistics, its verdicts in words, its picture."""
