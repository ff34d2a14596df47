"use strict";
// The report's own script: the blend slider, and NiiVue on the volumes that the page carries.
(() => {
  const id = name => document.getElementById(name);
  const picture = name => document.querySelector(`img[data-picture="${name}"]`);

  const slider = document.querySelector(".slider");
  if (slider) {
    const tops = [];
    for (const plane of ["axial", "coronal", "sagittal"]) {
      const pane = picture(`atlas-${plane}`).parentElement.cloneNode(true);
      const top = picture(`moved-${plane}`).cloneNode();
      pane.querySelector("img").removeAttribute("data-picture");
      top.removeAttribute("data-picture");
      top.className = "over";
      pane.querySelector("img").after(top);
      slider.append(pane);
      tops.push(top);
    }
    const range = slider.querySelector("input");
    range.oninput = () => tops.forEach(top => { top.style.opacity = range.value / 100; });
    range.oninput();
    slider.hidden = false;
  }

  const section = id("viewer-section");
  if (!section) return;
  const note = id("viewer-note"), canvas = id("canvas");
  const text = name => (id(name) ? id(name).textContent : "");
  const fail = why => {
    note.textContent = `No interactive viewer: ${why}. Everything else on this page is complete.`;
    note.hidden = false;
    id("viewer").hidden = true;
  };

  const loadScript = async () => {
    const packed = Uint8Array.from(atob(text("niivue")), letter => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const code = await new Response(stream).blob();
    const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
    await new Promise((done, failed) => {
      const script = document.createElement("script");
      script.onload = done;
      script.onerror = () => failed(new Error("its script did not load"));
      script.src = url;
      document.head.append(script);
    });
    URL.revokeObjectURL(url);
  };

  const start = async () => {
    const probe = document.createElement("canvas").getContext("webgl2");
    if (!probe) return fail("this browser has no WebGL 2");
    probe.getExtension("WEBGL_lose_context")?.loseContext();
    if (typeof DecompressionStream === "undefined") return fail("this browser is too old");
    await loadScript();
    id("viewer").hidden = false;
    const nv = new niivue.Niivue({
      isRadiologicalConvention: true, sagittalNoseLeft: true, show3Dcrosshair: true, backColor: [0, 0, 0, 1],
      isColorbar: false, dragAndDropEnabled: false, loadingText: "", crosshairColor: [0.3, 0.65, 1, 0.8],
      crosshairWidth: 0.5, multiplanarShowRender: 0, logLevel: "error",
    });
    nv.onLocationChange = at => {
      const mm = Array.from(at.mm).slice(0, 3).map(v => v.toFixed(1));
      const values = at.values.map(v => `${v.name.replace(/\.nii\.gz$/, "")} ${v.label || Number(v.value.toFixed(3))}`);
      id("place").textContent = `(${mm.join(", ")}) mm, RAS: ${values.join("; ")}`;
    };
    await nv.attachToCanvas(canvas);
    const layer = {};
    for (const [name, options] of Object.entries(JSON.parse(text("volumes")))) {
      const { colors, ...rest } = options;
      const image = await niivue.NVImage.loadFromBase64({ base64: text(`volume-${name}`), ...rest });
      if (colors) image.setColormapLabel(colors);
      nv.addVolume(image);
      layer[name] = image;
    }
    const opacity = (name, value) => {
      if (layer[name]) nv.setOpacity(nv.volumes.indexOf(layer[name]), value);
    };
    const bind = (name, change) => {
      const control = id(name);
      if (!control) return;
      control.oninput = () => change(control.type === "checkbox" ? Number(control.checked) : Number(control.value));
      control.oninput();
    };
    // In the volume, one opaque image hides the other: it shows the atlas.
    const volume = 4;
    bind("view", value => {
      nv.setSliceType(value);
      opacity("moved", value === volume ? 0 : id("blend").value / 100);
      id("blend").disabled = value === volume;
    });
    bind("blend", value => opacity("moved", value / 100));
    bind("labels", value => opacity("labels", value / 100));
    bind("outline", value => nv.setAtlasOutline(value));
    bind("change", value => opacity("change", value / 100));
    const center = JSON.parse(text("center"));
    nv.scene.crosshairPos = nv.mm2frac(center);
    nv.drawScene();
    nv.createOnLocationChange();
    note.hidden = true;
    section.dataset.ready = "yes";
  };

  const once = () => start().catch(error => fail(error.message || String(error)));
  if (typeof IntersectionObserver === "undefined") return void once();
  const observer = new IntersectionObserver(entries => {
    if (entries.some(entry => entry.isIntersecting)) {
      observer.disconnect();
      once();
    }
  }, { rootMargin: "200px" });
  observer.observe(section);
})();
