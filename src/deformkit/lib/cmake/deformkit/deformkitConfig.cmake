# deformkit::deformkit, for a program that runs models with deformkit's operators and no Python:
#
#   find_package(Torch REQUIRED)
#   find_package(deformkit REQUIRED)
#   target_link_libraries(program deformkit::deformkit "${TORCH_LIBRARIES}")
#
# CMAKE_PREFIX_PATH contains the folder above that of deformkit.library_path().
get_filename_component(_deformkit_lib "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
set(DEFORMKIT_LIBRARY "${_deformkit_lib}/libdeformkit.so")
if(NOT EXISTS "${DEFORMKIT_LIBRARY}")
  set(${CMAKE_FIND_PACKAGE_NAME}_FOUND FALSE)
  set(${CMAKE_FIND_PACKAGE_NAME}_NOT_FOUND_MESSAGE "there is no ${DEFORMKIT_LIBRARY}: deformkit was installed without kernels")
  return()
endif()

if(NOT TARGET deformkit::deformkit)
  add_library(deformkit::deformkit SHARED IMPORTED)
  set_target_properties(deformkit::deformkit PROPERTIES IMPORTED_LOCATION "${DEFORMKIT_LIBRARY}")
  if(WIN32)
    set_target_properties(deformkit::deformkit PROPERTIES IMPORTED_IMPLIB "${_deformkit_lib}/libdeformkit.lib")
  elseif(NOT APPLE)
    # The program calls no function of the library: it is loaded for the operators that it registers.
    set_target_properties(deformkit::deformkit PROPERTIES INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
  endif()
endif()
unset(_deformkit_lib)
