"""Each contender's colour (Okabe and Ito) and marker, the same in all figures."""

LOOKS = {
    "eager": ("#6E6E6E", "s"),
    "torch.compile": ("#000000", "x"),
    "PyTorch": ("#D55E00", "P"),
    "TRL 1.16": ("#E69F00", "v"),
    "Liger": ("#CC79A7", "D"),
    "CCE": ("#009E73", "^"),
    "fastdpo": ("#0072B2", "o"),
    "fastdpo exact": ("#56B4E9", "o"),
    "fastdpo exact, kept": ("#0072B2", "s"),
    "fastdpo, in place": ("#56B4E9", "o"),
}
