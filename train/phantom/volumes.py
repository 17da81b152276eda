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

# What was measured in people, mL where no other unit stands; the numbers in brackets are the references of docs/phantoms.md.
LITERATURE: dict[str, str] = {
    "liver": "1281 ± 219 [1]; 825-1700 [2]",
    "right_kidney": "weight 165 ± 40 g men, 122 ± 29 g women [3]",
    "left_kidney": "8 g more [3]",
    "spleen": "215, 107-315 [4]; 198 ± 88 [5]; 81-322 [2]",
    "pancreas": "77.9 ± 21.7, 18.8-139.8 [6]; 72.4 ± 25.8 [7]",
    "right_adrenal_gland": "4.26 ± 0.86 [8]; 3.47 ± 1.33 [9]",
    "left_adrenal_gland": "4.23 ± 0.74 [8]; 4.77 ± 1.33 [9]",
    "gallbladder": "21-38 fasting [10]; less after a meal",
    "stomach": "62-130 fasting, 536-748 after 600 mL [11]",
    "duodenum": "none found; 25 cm of 2 to 3 cm make 80-175, less where it is collapsed",
    "aorta": "diameter 19.0 ± 2.3 mm at T12, 13.8 ± 1.9 at L3, men [12]",
    "inferior_vena_cava": "25.8 ± 3.5 by 16.3 ± 2.9 mm at the renal veins [13]",
    "esophagus": "diameter 1 to 2 cm",
}
