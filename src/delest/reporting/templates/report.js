(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const palette = ["page", "ink", "ink2", "ink3", "line", "surface", "accent", "quiet", "good", "warn", "wash",
    "parameters", "buffers", "gradients", "optimizer", "activations", "temporaries", "data"];

  function paint(value, colors) {
    if (Array.isArray(value)) return value.map(item => paint(item, colors));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, /colors?$/.test(key) ? named(item, colors) : paint(item, colors)]));
  }

  function named(color, colors) {
    return Array.isArray(color) ? color.map(item => named(item, colors)) : colors[color] ?? color;
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    const colors = Object.fromEntries(palette.map(name => ["@" + name, style.getPropertyValue("--" + name).trim()]));
    for (const [name, figure] of Object.entries(figures)) {
      const { data, layout } = paint(figure, colors);
      Plotly.react("chart-" + name, data, layout, { displayModeBar: false, responsive: true, doubleClick: false });
    }
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
