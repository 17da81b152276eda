"""What a healthy adult's organs may measure: the limits that every phantom keeps. docs/phantoms.md has the sources."""

# mL, least and most, where the organ is whole in view and nothing is wrong with it. Aorta, vena cava and esophagus have no
# ends of their own: theirs hold for a view from 160 mm below to 190 mm above the disc between L1 and L2.
LIMITS: dict[str, tuple[float, float]] = {
    "liver": (750, 2500),
    "right_kidney": (90, 300),
    "spleen": (70, 350),
    "pancreas": (18, 220),
    "aorta": (20, 150),
    "inferior_vena_cava": (20, 200),
    "right_adrenal_gland": (1.2, 8),
    "left_adrenal_gland": (1.2, 9),
    "gallbladder": (1.5, 95),
    "esophagus": (10, 60),
    "stomach": (40, 1000),
    "duodenum": (18, 170),
    "left_kidney": (90, 300),
}
