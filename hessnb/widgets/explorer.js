function (root) {
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const controls = [...root.querySelectorAll("select, input")];
  const show = () => {
    const chosen = controls.map((control) => Number(control.value));
    const texts = {};
    for (let n = 0; n <= chosen.length; n++) Object.assign(texts, data.fields[chosen.slice(0, n).join(",")]);
    controls.forEach((control, i) => {
      if (control.type !== "range") return;
      const option = data.options[i][chosen[i]];
      control.setAttribute("aria-valuetext", option);
      control.nextElementSibling.textContent = option;
    });
    root.querySelector(".hessnb-said").innerHTML = texts.said;
    root.querySelector(".hessnb-picture").innerHTML = data.template.replace(/\{(\w+)\}/g, (_, name) => texts[name]);
  };
  for (const control of controls) control.addEventListener("input", show);
}
