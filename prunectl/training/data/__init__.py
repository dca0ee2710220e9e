"""Training and calibration data from many sources, behind one SPEC and one interface."""
