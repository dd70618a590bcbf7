"""Snapdragon: chips, Qualcomm's compiler and emulator, context binaries, Genie and its folder."""
