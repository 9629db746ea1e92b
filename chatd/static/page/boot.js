// Leave for the instructions if this browser cannot start the page: it has no modules, or a script of the page fails
// before page.js has run.  This script is for every browser, so it is ECMAScript 5.
(function () {
  "use strict";
  var scripts = document.getElementsByTagName("script");
  var script = document.currentScript || scripts[scripts.length - 1];
  var root = script.src.replace(/static\/[^?#]*$/, "");
  var started = false;

  function leave() {
    if (!started) location.replace(root + "about");
  }

  function isOurs(url) {
    return typeof url === "string" && url.indexOf(root + "static/") === 0;
  }

  if (!("noModule" in document.createElement("script"))) {
    leave();
    return;
  }
  document.addEventListener(
    "load",
    function (event) {
      if (event.target.type === "module") started = true;
    },
    true
  );
  window.addEventListener(
    "error",
    function (event) {
      // A script that fails, or cannot be loaded.  Scripts of the browser's extensions may fail too.
      if (isOurs(event.filename) || (event.target && isOurs(event.target.src))) leave();
    },
    true
  );
})();
