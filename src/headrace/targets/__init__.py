"""Where a bundle's device graphs go: Qualcomm's compiler, emulator and Genie."""
