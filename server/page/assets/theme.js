// Before anything is drawn: the theme that this browser was told last. Without one, the system's holds.
const theme = localStorage.getItem("pushstep-theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
